"""Guards: what is pushed is what differs, by checksum, and nothing of anybody else's is removed."""

from __future__ import annotations

from huggingface_hub import CommitOperationAdd
from huggingface_hub.hf_api import RepoFile

from recipes.hub.plan import Head, compare, human_size, is_same
from recipes.hub.repository import several
from recipes.hub.revisions import listing
from tests.hub import File


def there(files: dict[str, File]) -> Head:
    return Head("0" * 40, {path: RepoFile(**file.described(path)) for path, file in files.items()})


def adding(files: dict[str, bytes]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, content) for path, content in files.items()]


def test_same_bytes_are_left_alone_and_all_others_are_added():
    """Risk: a file of the same length is taken for the same; or a large file is compared by git's checksum."""
    for large in (False, True):
        head = there({"a": File(b"one", large), "b": File(b"two", large)})
        plan = compare(adding({"a": b"one", "b": b"TWO", "c": b"three"}), head)
        assert (plan.paths, plan.bytes, plan.delete) == ({"b", "c"}, 8, ())
        assert not compare(adding({"a": b"one", "b": b"two"}), head)


def test_a_file_of_another_length_is_not_read(tmp_path):
    (tmp_path / "weights").write_bytes(b"12345")
    addition = CommitOperationAdd("weights", tmp_path / "weights")
    (tmp_path / "weights").unlink()
    assert not is_same(addition, RepoFile(**File(b"1234", large=True).described("weights")))


def test_old_files_that_would_be_loaded_are_removed_and_no_others():
    """Risk: from_pretrained finds the shards of a former model; or somebody's files are swept away."""
    stale = ["chat_template.jinja", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    theirs = ["notes.md", "models/small.safetensors", "model.gguf", "adapter.safetensors"]
    head = there({path: File(b"x") for path in (*stale, *theirs)})
    assert compare(adding({"config.json": b"{}", "model.safetensors": b"y"}), head).delete == tuple(stale)
    assert compare(adding({"revisions.txt": b"step1\n"}), head).delete == (), "no model is pushed, so none is replaced"


def test_what_somebody_changed_is_told_from_what_they_left():
    before = there({"a": File(b"1"), "b": File(b"1"), "c": File(b"1", True)})
    after = there({"a": File(b"2"), "c": File(b"1", True), "d": File(b"1")})
    assert before.differs(after) == {"a", "b", "d"}


def test_the_list_of_revisions_is_in_the_order_of_the_steps():
    assert listing(["main", "step1000", "step64", "step0", "step512-old", "v2"]) == b"step0\nstep64\nstep1000\n"


def test_sizes_are_decimal():
    assert [human_size(count) for count in (0, 999, 1000, 649_291_776)] == ["0B", "999B", "1.00kB", "649MB"]


def test_many_branches_are_told_in_a_few_words():
    branches = [f"step{step}" for step in range(150)]
    assert several(branches[:3]) == "step0, step1, step2"
    assert several(branches) == "step0 … step149 (150 branches)"
