"""Guards: whatever goes wrong is one line and exit code 2; nothing is lost, and the same command resumes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from recipes.hub import plan
from recipes.hub.errors import HubAway, of_upload
from sinkmodel.errors import UserError
from tests.hub import READ_ONLY, TOKEN, File
from tests.recipes.corpus import tree

FOR_EVER = 1000


@pytest.fixture(autouse=True)
def _all_weights_are_large(monkeypatch):
    monkeypatch.setattr("recipes.hub.repository.LARGE", 100_000)


def refused(result: tuple[int, str, str]) -> str:
    """The one line that a refusal ends with."""
    code, out, err = result
    assert (code, out) == (2, "")
    line = err.splitlines()[-1]
    assert line.startswith("sink-push: ")
    assert "Traceback" not in err
    assert TOKEN not in err
    return line


# ---------------------------------------------------------------------------------------------- what is asked is wrong


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repo", "me/x"], "one of the arguments --model --run is required"),
        (["--model", "model", "--run", "run", "--repo", "me/x"], "not allowed with argument"),
        (["--model", "model", "--repo", "sink"], "--repo is 'sink'; give ORG/NAME"),
        (["--model", "model", "--repo", "https://hub/me/x"], "give ORG/NAME"),
        (["--model", "model", "--repo", "me/two--dashes.git"], "which the Hub does not accept"),
        (["--model", "model", "--repo", "me/x", "--every", "10"], "--every is for --run; leave it out"),
        (["--model", "model", "--repo", "me/x", "--follow"], "--follow is for --run"),
        (["--run", "run", "--repo", "me/x", "--revision", "step1"], "--revision is for --model"),
        (["--run", "run", "--repo", "me/x", "--tag", "v1"], "--tag is for --model"),
        (["--run", "run", "--repo", "me/x", "--every", "0"], "0 is not a number above 0"),
        (["--model", "model", "--repo", "me/x", "--revision", "a b"], "--revision is 'a b'"),
        (["--model", "model", "--repo", "me/x", "--revision", "../up"], "--revision is '../up'"),
        (["--model", "model", "--repo", "me/x", "--no-card", "--report", "model"], "are for the card"),
        (["--model", "model", "--repo", "me/x", "--report", "nowhere"], "nowhere"),
        (["--model", "model", "--repo", "me/x", "--results", "nowhere.json"], "nowhere.json"),
        (["--model", "model", "--repo", "me/x", "--privat"], "did you mean --private?"),
        (
            ["--model", "nothing", "--repo", "me/x"],
            "nothing is not a folder; give one that sink-export or sink-evolve wrote",
        ),
        (["--model", "empty", "--repo", "me/x"], "empty is not a model folder: it has no config.json"),
        (["--model", "no-weights", "--repo", "me/x"], "no-weights is not a model folder: it has no *.safetensors"),
        (["--model", "broken", "--repo", "me/x"], "broken/config.json is not valid JSON"),
        (["--model", "other", "--repo", "me/x"], "other/config.json names no model_type"),
        (["--model", "run", "--repo", "me/x"], "run is a run, not a model folder; push it with --run run"),
        (["--run", "model", "--repo", "me/x"], "model/config.yaml does not exist"),
        (["--run", "run", "--repo", "me/x"], "run holds no checkpoints/step*.ckpt yet"),
    ],
)
def test_wrong_input_is_named_and_nothing_is_made(hub, push, model, words, message):
    for name, files in {
        "empty": {},
        "no-weights": {"config.json": "{}"},
        "broken": {"config.json": "{", "model.safetensors": ""},
        "other": {"config.json": "{}", "model.safetensors": ""},
        "run": {"config.yaml": "schedule: {steps: 10}", "checkpoints/readme": ""},
    }.items():
        Path(name).mkdir()
        for path, text in files.items():
            Path(name, path).parent.mkdir(exist_ok=True)
            Path(name, path).write_text(text)
    before = tree(Path())
    assert message in refused(push(*words))
    assert not hub.repositories
    assert tree(Path()) == before


# ---------------------------------------------------------------------------------------------------------- who may not


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "no token for the Hub: run `hf auth login`, or export HF_TOKEN; it must be allowed to write to org"),
        ("hf_mistypëd", "the token for the Hub, from HF_TOKEN or from the login, has a character that no token has"),
        ("hf_mis typed", "the token for the Hub, from HF_TOKEN or from the login, has a character that no token has"),
        ("hf_mistyped", "the Hub refuses the token of HF_TOKEN or of the login (Invalid credentials"),
        (READ_ONLY, "your token may not write to org/sink (You don't have the rights"),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_a_token_that_is_none_or_may_not_write_is_named(hub, push, model, monkeypatch, token, message, there):
    if there:
        push("--model", model, "--repo", "org/sink", "--no-card")
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    (model / "notes.txt").write_text("new")
    line = refused(push("--model", model, "--repo", "org/sink", "--no-card"))
    assert message in line
    assert (token or "no such") not in line
    assert "org/sink" not in hub.repositories or "notes.txt" not in hub.repositories["org/sink"].files()


def test_another_organisation_is_not_written_to(hub, push, model):
    assert "may not write to strangers/sink" in refused(push("--model", model, "--repo", "strangers/sink"))


def test_a_login_is_as_good_as_the_environment(hub, push, model, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN)
    assert push("--model", model, "--repo", "org/sink")[0] == 0


def test_a_repository_that_is_gone_meanwhile_is_named(hub, push, model):
    hub.trouble("GET .*/refs", meanwhile=hub.repositories.clear)
    assert "org/sink is not on the Hub, or your token may not see it" in refused(
        push("--model", model, "--repo", "org/sink")
    )


# ------------------------------------------------------------------------------------------------ the Hub, and the way


def test_a_hub_that_cannot_be_reached_is_named(hub, push, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    line = refused(push("--model", model, "--repo", "org/sink"))
    assert "http://127.0.0.1:9 cannot be reached" in line
    assert "nothing was changed on org/sink; the same command resumes from there" in line


def test_being_offline_on_purpose_is_named(hub, push, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(push("--model", model, "--repo", "org/sink"))


@pytest.mark.parametrize("trouble", [{"status": 503}, {"lost": "half"}, {"lost": "answer"}])
def test_an_upload_that_fails_half_way_goes_on_with_the_same_command(hub, push, model, trouble):
    """Risk: a repository with half a model; or what was sent is sent again; or only a traceback."""
    (model / "more.safetensors").write_bytes(bytes(200_000))
    hub.trouble("PUT /lfs/", after=1, times=FOR_EVER, **trouble)
    line = refused(push("--model", model, "--repo", "org/sink", "--no-card"))
    assert ("fails" if "status" in trouble else "cannot be reached") in line
    first, second = ("more", "model") if "more.safetensors, not" in line else ("model", "more")
    assert f"uploaded: {first}.safetensors, not yet in a commit; the same command resumes from there" in line
    assert hub.repositories["org/sink"].files().keys() == {".gitattributes"}, "all of it or nothing"
    hub.troubles.clear()
    hub.log.clear()
    kept = trouble == {"lost": "answer"}  # it had arrived
    code, _, err = push("--model", model, "--repo", "org/sink", "--no-card")
    assert code == 0
    assert f"sending {second}.safetensors" in err
    assert hub.uploads == (0 if kept else 1)
    assert (
        hub.repositories["org/sink"].files()["model.safetensors"].content == (model / "model.safetensors").read_bytes()
    )


@pytest.mark.parametrize(
    ("status", "message"), [(403, "your token may not write to org/sink"), (404, "did not take a file")]
)
def test_what_xet_refuses_is_one_line_too(hub, model, status, message):
    """Risk: it sends large files unless it is switched off, and its errors are not an HTTPError."""
    hub.trouble("GET .*/xet-write-token/", times=FOR_EVER, status=status)
    environment = {**os.environ, **hub.environment, "HF_HUB_DISABLE_XET": "0", "HF_TOKEN": TOKEN, "HF_HOME": "home"}
    words = [sys.executable, "-m", "recipes.publish", "--model", model, "--repo", "org/sink"]
    environment |= {"PYTHONPATH": str(Path(plan.__file__).parents[2])}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert message in refused((done.returncode, done.stdout, done.stderr))
    assert hub.asked("/xet-write-token/")
    assert TOKEN not in "".join(path.read_text(errors="replace") for path in Path("home").rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("Data processing error: CAS service error: Request failed after 5 retries"), HubAway),
        (ConnectionError("Network error: Request error: HTTP status server error (503 Service Unavailable)"), HubAway),
        (ConnectionError("Network error: HTTP status client error (401 Unauthorized)"), UserError),
        (PermissionError("Authentication error: token expired"), UserError),
        (FileNotFoundError(2, "No such file or directory", "model.safetensors"), FileNotFoundError),
        (OfflineModeIsEnabled("offline"), OfflineModeIsEnabled),
    ],
)
def test_errors_of_sending_are_told_apart(error, kind):
    """Risk: what will not pass is tried for ever while following; or a file that is gone counts as the Hub's fault."""
    assert type(of_upload(error, "org/sink")) is kind


@pytest.mark.parametrize("trouble", [{"status": 502}, {"lost": "half"}, {"lost": "answer"}])
def test_one_commit_is_made_whatever_becomes_of_the_answer(hub, push, model, trouble):
    """Risk: a commit whose answer was lost is made twice, or counts as failed; one that was not made counts as done."""
    hub.trouble("POST .*/commit/", **trouble)
    assert push("--model", model, "--repo", "org/sink", "--no-card")[0] == 0
    history = hub.repositories["org/sink"].history()
    assert [commit.title for commit in history] == ["Push model", "initial commit"]
    assert history[0].files.keys() == {".gitattributes", *tree(model)}


def test_a_commit_that_never_comes_through_says_what_is_up(hub, push, model):
    hub.trouble("POST .*/commit/", times=FOR_EVER, status=500)
    assert "uploaded: model.safetensors, not yet in a commit" in refused(push("--model", model, "--repo", "org/sink"))
    hub.troubles.clear()
    assert push("--model", model, "--repo", "org/sink")[0] == 0
    assert hub.uploads == 1


@pytest.mark.parametrize(
    "request_", ["GET .*/refs", "GET .*/tree/", "POST .*/api/repos/create", "POST .*validate-yaml"]
)
def test_trouble_anywhere_is_one_line(hub, push, model, request_):
    hub.trouble(request_, times=FOR_EVER, status=503)
    assert "fails" in refused(push("--model", model, "--repo", "org/sink"))


def test_a_page_of_something_in_between_is_one_line(hub, push, model, monkeypatch):
    """Risk: a proxy answers in HTML, and huggingface_hub stumbles over it."""
    monkeypatch.setattr("tests.hub.server.Handler.refs", lambda self, name: (b"<html>", {}))
    assert "does not answer as the Hub does" in refused(push("--model", model, "--repo", "org/sink"))


@pytest.mark.parametrize("trouble", [{"status": 503}, {"lost": "answer"}])
def test_a_card_that_the_hub_does_not_give_is_not_taken_for_none(hub, push, model, trouble):
    """Risk: huggingface_hub calls that "not found" too, and what was written by hand there is lost."""
    push("--model", model, "--repo", "org/sink")
    repository = hub.repositories["org/sink"]
    repository.add("README.md", b"# Mine\nby hand")
    hub.trouble("(GET|HEAD) .*/resolve/", times=FOR_EVER, **trouble)
    message = "does not send README.md" if "status" in trouble else "cannot be reached"
    assert message in refused(push("--model", model, "--repo", "org/sink"))
    assert repository.files()["README.md"] == File(b"# Mine\nby hand")


def test_a_card_that_the_hub_refuses_is_named(hub, push, model):
    (model / "README.md").write_text("---\nlicense: [mit\n---\n# A model\n")
    line = refused(push("--model", model, "--repo", "org/sink", "--no-card"))
    assert "the Hub refuses what is pushed to org/sink: Invalid metadata in README.md" in line
    assert "README.md" not in hub.repositories["org/sink"].files()


def test_too_many_requests_are_waited_for(hub, push, model):
    hub.trouble("GET .*/refs", times=FOR_EVER, status=429)
    assert "too many requests" in refused(push("--model", model, "--repo", "org/sink"))


# ------------------------------------------------------------------------------------------------------- somebody else


def test_a_commit_of_somebody_else_is_kept_where_it_is_about_other_files(hub, push, model):
    push("--model", model, "--repo", "org/sink", "--no-card")
    repository = hub.repositories["org/sink"]
    (model / "notes.txt").write_text("ours")
    hub.trouble("POST .*/commit/", meanwhile=lambda: repository.add("theirs.txt", b"theirs"))
    assert push("--model", model, "--repo", "org/sink", "--no-card")[0] == 0
    assert repository.files()["theirs.txt"] == File(b"theirs")
    assert repository.files()["notes.txt"] == File(b"ours")


def test_a_file_that_somebody_else_changed_is_not_overwritten(hub, push, model):
    """Risk: a card that is edited on the Hub in this moment is lost."""
    repository_of = hub.repositories.__getitem__
    hub.trouble("POST .*/commit/", meanwhile=lambda: repository_of("org/sink").add("README.md", b"# Mine\nby hand"))
    line = refused(push("--model", model, "--repo", "org/sink"))
    assert "somebody else has changed README.md on main of org/sink in the meantime" in line
    repository = hub.repositories["org/sink"]
    assert repository.files()["README.md"] == File(b"# Mine\nby hand")
    assert push("--model", model, "--repo", "org/sink")[0] == 0
    assert b"by hand" in repository.files()["README.md"].content
    assert "model.safetensors" in repository.files()


def test_somebody_who_commits_all_the_time_is_given_way_to(hub, push, model):
    counter = iter(range(FOR_EVER))
    hub.trouble(
        "POST .*/commit/",
        times=FOR_EVER,
        meanwhile=lambda: hub.repositories["org/sink"].add(f"{next(counter)}.txt", b"theirs"),
    )
    line = refused(push("--model", model, "--repo", "org/sink"))
    assert "somebody else commits to org/sink at the same time" in line
    assert next(counter) == 2, "two tries, and no more"
