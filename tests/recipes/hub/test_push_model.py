"""Guards: a model folder becomes a repository that others load, nothing is sent twice, and nobody sees the token."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.card.card import BEGIN, END
from tests.hub import TOKEN, File
from tests.recipes.corpus import tree

ROOT = Path(__file__).resolve().parents[3]


def test_a_pushed_model_is_the_same_model_by_its_name(hub, push, model):
    """Risk: the sink, or what puts it in front, is lost on the way."""
    code, out, err = push("--model", model, "--repo", "org/sink")
    assert (code, out) == (0, f"{hub.endpoint}/org/sink\n")
    assert "pushed main" in err
    there = AutoModelForCausalLM.from_pretrained("org/sink").state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(model).state_dict().items():
        assert torch.equal(value, there[name]), name
    tokenizer = AutoTokenizer.from_pretrained("org/sink")
    ids = tokenizer(["some text", "more"])["input_ids"]
    assert all(row[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in row[1:] for row in ids)
    assert b"org/sink" in hub.repositories["org/sink"].files()["README.md"].content


def test_nothing_is_sent_where_nothing_has_changed(hub, push, model):
    """Risk: every push makes a commit, and people download the weights again."""
    push("--model", model, "--repo", "org/sink")
    uploads, commits = hub.uploads, hub.asked("POST .*/commit/")
    code, out, err = push("--model", model, "--repo", "org/sink")
    assert (code, out) == (0, f"{hub.endpoint}/org/sink\n")
    assert "nothing has changed" in err
    assert (hub.uploads, hub.asked("POST .*/commit/")) == (uploads, commits)


def test_only_what_has_changed_is_sent(hub, push, model):
    push("--model", model, "--repo", "org/sink", "--no-card")
    (model / "notes.txt").write_text("new")
    os.utime(model / "model.safetensors")
    before = hub.repositories["org/sink"].files()
    push("--model", model, "--repo", "org/sink", "--no-card")
    after = hub.repositories["org/sink"].files()
    assert after == {**before, "notes.txt": File(b"new")}
    assert hub.uploads == 1


def test_the_folder_stays_as_it_is_and_so_does_what_was_written_by_hand(hub, push, model):
    """Risk: the generated card is written over the user's, here or there."""
    (model / "README.md").write_text("Written by hand, *here*.\n")
    (model / ".secret").write_text("not for others")
    before = tree(model)
    push("--model", model, "--repo", "org/sink")
    assert tree(model) == before
    repository = hub.repositories["org/sink"]
    assert ".secret" not in repository.files()
    card = repository.files()["README.md"].content.decode()
    assert "Written by hand, *here*." in card.split(BEGIN)[1].split(END)[0]
    (model / "README.md").unlink()
    repository.add("README.md", card.replace("by hand, *here*", "by hand, *there*").encode())
    (model / "notes.txt").write_text("something new")
    push("--model", model, "--repo", "org/sink")
    assert "by hand, *there*." in repository.files()["README.md"].content.decode()
    assert "notes.txt" in repository.files()


@pytest.mark.parametrize("place", ["model/notes.txt", "model/figures", "report/report.md", "report/figures/a.png"])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_link_out_of_a_folder_is_refused_and_nothing_is_pushed(hub, push, model, place, dry):
    """Risk: what a link leads to is published, as a private file, without a word."""
    report = Path("report")
    (report / "figures").mkdir(parents=True)
    (report / "report.md").write_text("## A section\n\n![words](figures/a.png)\n")
    (report / "figures" / "a.png").write_text("a picture")
    private = Path("private")
    private.mkdir()
    (private / "key").write_text("secret")
    Path(place).unlink(missing_ok=True)
    Path(place).symlink_to((private if place.endswith("figures") else private / "key").resolve())
    code, out, err = push("--model", model, "--report", report, "--repo", "org/sink", *dry)
    assert (code, out, hub.repositories) == (2, "", {})
    assert f"{place} leads out of {place.partition('/')[0]}, to " in err.splitlines()[-1]


def test_what_a_link_inside_leads_to_is_pushed_under_both_names(hub, push, model):
    (model / "old").mkdir()
    (model / "old" / "notes.txt").write_text("words")
    (model / "notes.txt").symlink_to("old/notes.txt")
    (model / "now").symlink_to("old")
    assert push("--model", model, "--repo", "org/sink")[0] == 0
    files = hub.repositories["org/sink"].files()
    assert {files[name].content for name in ("notes.txt", "old/notes.txt", "now/notes.txt")} == {b"words"}


def test_a_checkpoint_is_a_branch_of_its_own_and_main_lists_it(hub, push, model):
    """Risk: the branch carries along what main has; or the list is out of order."""
    push("--model", model, "--repo", "org/sink")
    hub.repositories["org/sink"].add("figure.svg", b"of main")
    for step in (1000, 64):
        code, out, _ = push("--model", model, "--repo", "org/sink", "--revision", f"step{step}", "--no-card")
        assert (code, out) == (0, f"{hub.endpoint}/org/sink/tree/step{step}\n")
    repository = hub.repositories["org/sink"]
    assert repository.files("step64").keys() == {".gitattributes", *tree(model)}
    assert repository.files()["revisions.txt"].content == b"step64\nstep1000\n"
    assert "figure.svg" in repository.files()
    assert hub.uploads == 1, "the same weights are there once"


def test_tags_are_made_and_do_not_move(hub, push, model):
    words = ("--model", model, "--repo", "org/sink", "--no-card", "--tag", "v1")
    assert push(*words)[0] == push(*words)[0] == 0
    repository = hub.repositories["org/sink"]
    first = repository.branches["main"]
    assert repository.tags == {"v1": first}
    (model / "notes.txt").write_text("new")
    code, _, err = push(*words)
    assert (code, repository.branches["main"], repository.tags) == (2, first, {"v1": first})
    assert "the tag v1 of org/sink names something else; give another --tag" in err
    code, _, err = push("--model", model, "--repo", "org/sink", "--revision", "v1")
    assert (code, "v1" in repository.branches) == (2, False)
    assert "is a tag" in err


def test_what_is_to_be_private_is_never_pushed_where_all_see_it(hub, push, model):
    push("--model", model, "--repo", "org/mine", "--private")
    assert hub.repositories["org/mine"].private
    assert push("--model", model, "--repo", "org/mine", "--private")[0] == 0
    push("--model", model, "--repo", "org/open", "--no-card")
    (model / "notes.txt").write_text("confidential")
    code, _, err = push("--model", model, "--repo", "org/open", "--private")
    assert code == 2
    assert "exists already and is public" in err
    assert "notes.txt" not in hub.repositories["org/open"].files()


def test_a_dry_run_says_what_would_be_sent_and_changes_nothing(hub, push, model, monkeypatch):
    weights = (model / "model.safetensors").stat().st_size
    code, out, err = push("--model", model, "--repo", "org/sink", "--dry-run")
    assert (code, hub.repositories) == (0, {})
    assert f"model.safetensors  {weights / 1000:.0f}kB" in out
    assert "org/sink is not on the Hub" in err
    push("--model", model, "--repo", "org/sink", "--no-card")
    hub.repositories["org/sink"].add("tokenizer.model", b"old")
    hub.repositories["org/sink"].add("chat_template.jinja", b"old")
    (model / "notes.txt").write_text("new")
    monkeypatch.delenv("HF_TOKEN")
    hub.log.clear()
    code, out, _ = push("--model", model, "--repo", "org/sink", "--no-card", "--dry-run")
    summary = f"{hub.endpoint}/org/sink  1 files, 3B"
    assert (code, out.splitlines()) == (0, ["notes.txt  3B", "chat_template.jinja  is removed", summary])
    assert hub.asked("^GET ") == hub.log, "it only looks"


def test_a_dry_run_works_where_no_hub_can_be_reached(hub, push, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    code, out, err = push("--model", model, "--repo", "org/sink", "--dry-run")
    assert (code, "model.safetensors" in out) == (0, True)
    assert "cannot be reached" in err


def test_no_second_copy_of_the_weights_is_made(hub, push, model, monkeypatch):
    temporary = Path("temporary")
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    weights, seen = (model / "model.safetensors").stat().st_size, []

    def look() -> None:
        seen.append(sum(path.stat().st_size for path in Path().rglob("*") if path.is_file()))

    before = sum(len(content) for content in tree(model).values())
    hub.trouble("PUT /lfs/", meanwhile=look)
    assert push("--model", model, "--repo", "org/sink")[0] == 0
    assert len(seen) == 1
    assert seen[0] < before + weights / 2
    assert not list(temporary.iterdir())


WATCHED = """
import sys
children = []
sys.addaudithook(lambda event, words: children.append(repr(words)) if event in {events} else None)
from recipes.publish import main
code = main(sys.argv[1:])
heavy = {{"torch", "lightning", "transformers"}} & set(sys.modules)
print("children", children, "heavy", heavy)
sys.exit(code)
""".format(events=("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"))


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("trouble", [None, 401, 403, 503])
def test_nobody_sees_the_token_and_torch_is_not_loaded(hub, model, trouble, debug):
    """Risk: it is in a log, in a file, in what is pushed, or in the arguments of a child, which `ps` shows."""
    if trouble is not None:
        hub.trouble("POST .*/preupload/", status=trouble, times=1 if trouble == 503 else 9)
    environment = {**os.environ, **hub.environment, "HF_TOKEN": TOKEN, "HF_HOME": "home", "TMPDIR": os.getcwd()}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"} if debug else {})
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, "--model", model, "--repo", "org/sink"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == (0 if trouble in (None, 503) else 2), done.stderr
    assert "heavy set()" in done.stdout
    assert "children" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert all(TOKEN.encode() not in content for content in tree(Path()).values())
    repository = hub.repositories["org/sink"]
    for commit in repository.history():
        assert TOKEN not in commit.title + commit.message
        assert all(TOKEN.encode() not in file.content for file in commit.files.values())


@pytest.mark.parametrize(("words", "code"), [(["--dry-run"], 0), ([], 2)])
def test_credentials_in_the_address_of_the_hub_are_not_shown(hub, model, words, code):
    """Risk: HF_ENDPOINT=http://user:password@host is printed. This Hub takes tokens alone, and refuses them."""
    environment = {**os.environ, **hub.environment, "HF_TOKEN": TOKEN, "HF_HOME": "home", "PYTHONPATH": str(ROOT)}
    environment["HF_ENDPOINT"] = environment["HF_ENDPOINT"].replace("://", "://somebody:opensesame@")
    done = subprocess.run(
        [sys.executable, "-m", "recipes.publish", "--model", model, "--repo", "org/sink", *words],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert "://***@127.0.0.1" in done.stdout + done.stderr
    assert "opensesame" not in done.stdout + done.stderr
