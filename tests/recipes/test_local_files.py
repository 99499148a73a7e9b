"""Guards: of many files none is lost in silence, none without text stops the others, and mending one loses no work."""

import gzip
import json

import pytest

from recipes import prepare
from recipes.data import preparation, writing
from recipes.data.local_files import LocalFiles
from recipes.data.shards import open_split
from sinkmodel.errors import UserError
from sinkmodel.text import read_documents
from tests.recipes.corpus import make_texts, tree, write_lines, write_tokenizer

ALL = ["--workers", "1", "--shard-tokens", "5000", "--validation-fraction", "0", "--test-fraction", "0"]


@pytest.fixture
def parts(tmp_path):
    """Six files of ten documents, the fourth of forty, and a tokenizer."""
    (tmp_path / "in").mkdir()
    write_tokenizer(tmp_path / "tokenizer.json")
    texts = {f"p{number}.jsonl": make_texts(40 if number == 3 else 10, 1500, seed=number) for number in range(6)}
    for name, each in texts.items():
        write_lines(tmp_path / "in" / name, each)
    return texts


def run(tmp_path, output="out", *names, more=()):
    names = names or (str(tmp_path / "in"),)
    argv = ["--input", *names, "--tokenizer", str(tmp_path / "tokenizer.json"), "--output", str(tmp_path / output)]
    return prepare.main([*argv, *ALL, *more])


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture
def small_units(monkeypatch):
    """A note after every unit, two documents long."""
    make_units = preparation.make_units
    monkeypatch.setattr(preparation, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(preparation, "make_units", lambda *a: make_units(*a, size=3000))


def test_mending_adding_and_removing_files_that_were_not_read_keeps_the_work(tmp_path, parts, small_units, capsys):
    """A damaged file stops the run; what was read before it is kept, whatever happens to the files after it."""
    lines = (tmp_path / "in" / "p3.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "in" / "p3.jsonl").write_text("".join(lines[:30]) + '{"text": \n' + "".join(lines[30:]))
    assert run(tmp_path) == 2
    assert "p3.jsonl:31: not a JSON object" in capsys.readouterr().err
    before = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert before["place"][1][0] == 3  # in the middle of the damaged file

    write_lines(tmp_path / "in" / "p3.jsonl", parts["p3.jsonl"])
    write_lines(tmp_path / "in" / "p0-new.jsonl", parts["p4.jsonl"][:3])
    write_lines(tmp_path / "in" / "p4.jsonl", parts["p4.jsonl"][3:])
    (tmp_path / "in" / "p5.jsonl").unlink()
    written = []
    write = writing.SplitWriter.write
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writing.SplitWriter, "write", lambda self, ids: (written.append(len(ids)), write(self, ids))[1])
        assert run(tmp_path) == 0
    stderr = capsys.readouterr().err
    assert "p3.jsonl has changed since it was read in part" in stderr
    assert "resuming" in stderr
    order = [str(tmp_path / "in" / f"{name}.jsonl") for name in ("p0", "p1", "p2", "p0-new", "p3", "p4")]
    assert run(tmp_path, "whole", *order) == 0
    assert open_split(tmp_path / "out", "train").documents == 80
    assert tree(tmp_path / "out") == {
        **tree(tmp_path / "whole"),
        "manifest.json": (tmp_path / "out" / "manifest.json").read_bytes(),
    }
    assert manifest(tmp_path / "out")["fingerprint"] == manifest(tmp_path / "whole")["fingerprint"]
    assert sum(written) < 2 * 0.7 * open_split(tmp_path / "out", "train").tokens  # what was kept was not made again
    assert run(tmp_path) == 0  # the order of reading is remembered
    assert "already complete" in capsys.readouterr().err


def test_a_file_that_was_read_must_stay_as_it_was(tmp_path, parts, small_units, capsys):
    lines = (tmp_path / "in" / "p3.jsonl").read_text()
    (tmp_path / "in" / "p3.jsonl").write_text(lines + "broken\n")
    assert run(tmp_path) == 2
    write_lines(tmp_path / "in" / "p3.jsonl", parts["p3.jsonl"])
    before = tree(tmp_path / "out")
    write_lines(tmp_path / "in" / "p1.jsonl", parts["p1.jsonl"][::-1])
    capsys.readouterr()
    assert run(tmp_path) == 2
    stderr = capsys.readouterr().err
    assert "was prepared from p1.jsonl, which has been edited since; restore it, or choose another output" in stderr
    (tmp_path / "in" / "p1.jsonl").unlink()
    assert run(tmp_path) == 2
    assert "was prepared from p1.jsonl, which has been removed since or is not given; " in capsys.readouterr().err
    assert tree(tmp_path / "out") == before


def test_a_file_removed_after_it_was_read_in_part_is_not_said_to_have_changed(tmp_path, parts, small_units, capsys):
    with (tmp_path / "in" / "p3.jsonl").open("a") as file:
        file.write("broken\n")
    assert run(tmp_path) == 2
    (tmp_path / "in" / "p3.jsonl").unlink()
    capsys.readouterr()
    assert run(tmp_path) == 0
    stderr = capsys.readouterr().err
    assert "p3.jsonl was read in part and has been removed since; its text is left out" in stderr
    assert "changed" not in stderr
    assert open_split(tmp_path / "out", "train").documents == 50
    write_lines(tmp_path / "in" / "p7.jsonl", parts["p3.jsonl"])
    assert run(tmp_path) == 2
    assert "was prepared without p7.jsonl, which has been added since; leave it out, or" in capsys.readouterr().err


def test_parts_without_text_add_nothing_and_are_counted(tmp_path, parts, small_units, capsys, monkeypatch):
    """Empty, blank, without rows: no error, whether they are there, come or go, and killed or not the same count."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "in"
    (folder / "p0.txt").write_bytes(b"")
    (folder / "p1-blank.txt").write_text(" \n\n")
    (folder / "p2-blank.jsonl").write_text('{"text": ""}\n\n{"text": null}\n')
    (folder / "p2-none.jsonl.gz").write_bytes(gzip.compress(b""))
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), folder / "p3.parquet")
    (folder / "p9.txt").write_bytes(b"")
    assert run(tmp_path, "whole") == 0
    assert "skipped" in (printed := capsys.readouterr().out)
    assert "3 rows without text" in printed
    assert open_split(tmp_path / "whole", "train").documents == 90
    assert manifest(tmp_path / "whole")["skipped"] == 3

    write = writing.FolderWriter.write
    for stop in (3_000, 12_000, 30_000):
        with monkeypatch.context() as patched:

            def interrupt(self, encoded, stop=stop):
                if self.tokens > stop:
                    raise KeyboardInterrupt
                write(self, encoded)

            patched.setattr(writing.FolderWriter, "write", interrupt)
            assert run(tmp_path) == 130
    (folder / "p9.txt").unlink()  # as a user does who thinks that it is in the way
    assert run(tmp_path) == 0
    assert manifest(tmp_path / "out")["skipped"] == 3
    assert manifest(tmp_path / "out")["fingerprint"] == manifest(tmp_path / "whole")["fingerprint"]


def test_a_corpus_without_any_text_is_an_error(tmp_path, parts, capsys):
    for name in parts:
        (tmp_path / "in" / name).write_text("\n" if name < "p3" else "")
    for more in ((), ("--validation-input", str(tmp_path / "in" / "p0.jsonl"))):
        names = (str(tmp_path / "in"),) if not more else (str(tmp_path / "good.jsonl"),)
        write_lines(tmp_path / "good.jsonl", ["text"] * 5)
        assert run(tmp_path, "out", *names, more=more) == 2
        error = capsys.readouterr().err
        what = f"input has no text: its 6 files, {tmp_path}/in/p0.jsonl first, hold none; give other files"
        if more:
            what = f"validation_input has no text: {tmp_path}/in/p0.jsonl holds none; give other files"
        assert error.splitlines()[-1] == f"sink-prepare: {what}"
        assert not (tmp_path / "out").exists()


def test_what_a_folder_or_pattern_leaves_out_is_named(tmp_path, capsys):
    """README and LICENSE alone were a corpus once, with three .json.gz and a .ndjson of text beside them."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_tokenizer(tmp_path / "tokenizer.json")
    (folder / "README.txt").write_text("about it")
    for number in range(3):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(4, 300, number))
        (folder / f"c4-{number}.json.gz").write_bytes(gzip.compress(lines.encode()))
    write_lines(folder / "more.ndjson", make_texts(4, 300, 9))
    (folder / "table.csv").write_text("a,b")
    (folder / "dataset_info.json").write_text('{\n  "splits": {}\n}\n')
    for number, name in enumerate((folder, folder / "*")):
        assert run(tmp_path, f"out{number}", str(name)) == 0
        error = capsys.readouterr().err
        assert ".csv: table.csv; .json (not lines of text): dataset_info.json" in error
        assert open_split(tmp_path / f"out{number}", "train").documents == 17
    (folder / "z.json").write_text('{"hidden_size": 64}')
    assert ".json (not lines of text): dataset_info.json, z.json" in LocalFiles([str(folder)], "text").left_out
    (folder / "z.json").write_text('{"hidden_size": 64}\n{"hidden_size": 128}\n')
    with pytest.raises(UserError, match=r"z.json: no text under the key 'text' \(there is hidden_size\)"):
        LocalFiles([str(folder)], "text")  # at once, not when its turn comes


def test_a_separator_makes_documents_of_one_text_file(tmp_path, small_units, capsys, monkeypatch):
    """As TinyStories comes: one file of text. Killed and resumed, every story is there once."""
    stories = make_texts(30, 700)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "stories.txt").write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    write_tokenizer(tmp_path / "tokenizer.json")
    assert run(tmp_path, "one") == 0
    assert "stories.txt is read as one document" in capsys.readouterr().err
    assert open_split(tmp_path / "one", "train").documents == 1
    option = ("--separator", "<|endoftext|>")
    assert run(tmp_path, "whole", more=(*option, "--test-fraction", "0.3")) == 0
    assert "is read as one document" not in capsys.readouterr().err
    kept = list(read_documents(tmp_path / "whole" / "test.jsonl"))
    assert 0 < len(kept) < 30
    assert set(kept) <= {story.strip("\n") for story in stories}
    write = writing.FolderWriter.write
    with monkeypatch.context() as patched:

        def interrupt(self, encoded):
            if self.tokens > 4000:
                raise KeyboardInterrupt
            write(self, encoded)

        patched.setattr(writing.FolderWriter, "write", interrupt)
        assert run(tmp_path, more=(*option, "--test-fraction", "0.3")) == 130
    assert run(tmp_path, more=(*option, "--test-fraction", "0.3")) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert sum(manifest(tmp_path / "out")["splits"][name]["documents"] for name in ("train", "test")) == 30


@pytest.mark.parametrize("separator", ["---", "#", "~", "\r\n\r\n", "--output"])
def test_a_separator_is_taken_as_it_is(tmp_path, capsys, separator):
    """Risk: YAML reads `---` as nothing, argparse as an option; line ends are normalised in the text alone."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(f"one{separator}two{separator}three".encode())
    write_tokenizer(tmp_path / "tokenizer.json")
    for number, option in enumerate((["--separator", separator], [f"--separator={separator}"])):
        assert run(tmp_path, f"out{number}", more=option) == 0
        assert open_split(tmp_path / f"out{number}", "train").documents == 3
    capsys.readouterr()
    assert run(tmp_path, "other", more=["--separator", "nowhere"]) == 0
    assert "the separator 'nowhere' occurs in no .txt file: each is one document" in capsys.readouterr().err


class Counted(list):
    """A list that counts the elements it gives."""

    given = 0

    def __getitem__(self, which):
        found = super().__getitem__(which)
        Counted.given += len(found) if isinstance(which, slice) else 1
        return found

    def __iter__(self):
        for element in super().__iter__():
            Counted.given += 1
            yield element


def test_the_work_for_each_file_does_not_grow_with_their_number(tmp_path):
    for number in range(50):
        (tmp_path / f"{number}.txt").write_text("text")
    corpus = LocalFiles([str(tmp_path)], "text")
    corpus.paths, corpus._stamps = Counted(corpus.paths), Counted(corpus._stamps)
    Counted.given = 0
    for _, pieces in corpus.documents([0, 0]):
        assert list(pieces) == ["text"]
        assert 0 <= corpus.fraction() <= 1
    assert corpus.fraction() == 1
    assert Counted.given <= 2 * 50


def test_a_link_to_nothing_is_no_text_left_out(tmp_path):
    """Risk: files that DVC or git-annex has not fetched are missing from the corpus."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").symlink_to("nowhere")
    for name in (tmp_path, tmp_path / "*", tmp_path / "b.txt"):
        with pytest.raises(UserError, match=r"b.txt is a link to nowhere, which is missing; fetch that file"):
            LocalFiles([str(name)], "text")


def test_a_link_is_the_same_file_as_its_target(tmp_path):
    """Each file is read once, under the name given first; a held-out text under another name is found out."""
    write_lines(tmp_path / "blob", ["one"])
    (tmp_path / "a.jsonl").symlink_to("blob")
    (tmp_path / "b.jsonl").symlink_to("blob")
    corpus = LocalFiles([str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")], "text")
    assert [path.name for path in corpus.paths] == ["b.jsonl"]
    with pytest.raises(UserError, match="given as input and as test_input"):
        preparation.prepare(
            preparation.PrepareConfig(
                output=str(tmp_path / "out"),
                input=[str(tmp_path / "a.jsonl")],
                test_input=[str(tmp_path / "b.jsonl")],
                vocabulary_size=300,
            )
        )
