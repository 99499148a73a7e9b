"""Guards: a run's checkpoints become branches, each its own and once; also while it trains, and across every break."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recipes.hub import runs
from sinkmodel.checkpoint import PREFIX, write_manifest
from sinkmodel.export import export
from sinkmodel.files import sha256_of
from sinkmodel.loading import load_base, load_model
from tests import tiny
from tests.hub import Hub
from tests.recipes.corpus import tree
from tests.recipes.runs import start_process

RUN = Path("runs/sink")
WORK = Path("runs/.sink.push")
FOR_EVER = 1000


def checkpoint(step: int, seed: float = 0.0) -> Path:
    """One as training leaves it, with its checksum; the weights differ from step to step."""
    aside = tiny.checkpoint(Path("aside"), "llama", step=step)
    content = torch.load(aside, weights_only=True)
    content["state_dict"][f"{PREFIX}model.norm.weight"][:] = step + seed
    torch.save(content, aside)
    path = RUN / "checkpoints" / aside.name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(path.parent, path.name, sha256_of(aside))
    return Path(shutil.move(aside, path))


def step_of(hub: Hub, revision: str) -> float:
    """The step of the weights that a revision has."""
    weights = hub.repositories["org/sink"].files(revision)["model.safetensors"].content
    return safetensors.torch.load(weights)["model.norm.weight"][0].item()


@pytest.fixture
def run():
    """A run of 21 steps, complete, with a checkpoint every 7."""
    for step in (7, 14, 21):
        checkpoint(step)
    (RUN / "config.yaml").write_text("schedule:\n  steps: 21\n")
    return RUN


@pytest.fixture
def pauses(monkeypatch):
    """What happens in each pause of following, in order; a pause too many fails."""
    coming: list[Callable[[], object]] = []
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        assert coming, "waits for something that does not come"
        coming.pop(0)()

    monkeypatch.setattr(runs, "time", SimpleNamespace(sleep=sleep))
    return SimpleNamespace(coming=coming, waited=waited)


def exports(err: str) -> list[str]:
    return re.findall(r"^(step\d+): exporting", err, re.M)


# ----------------------------------------------------------------------------------------------------- what it becomes


def test_each_checkpoint_is_a_branch_and_main_is_the_last(hub, push, run):
    """Risk: a branch has another step's weights; main has not the final ones; the list or the tag is missing."""
    code, out, _ = push("--run", run, "--repo", "org/sink")
    assert (code, out) == (0, f"{hub.endpoint}/org/sink\n")
    repository = hub.repositories["org/sink"]
    weights = {revision: step_of(hub, revision) for revision in repository.branches}
    assert weights == {"main": 21, "step7": 7, "step14": 14, "step21": 21}
    for revision, step in weights.items():
        loaded = AutoModelForCausalLM.from_pretrained("org/sink", revision=revision)
        assert loaded.model.norm.weight[0].item() == step
    assert repository.files()["revisions.txt"].content == b"step7\nstep14\nstep21\n"
    assert repository.tags == {"final-step21": repository.branches["main"]}
    assert "revisions.txt" not in repository.files("step7")
    for branch in repository.branches:
        assert b"org/sink" in repository.files(branch)["README.md"].content
    assert hub.uploads == 3, "main shares the weights of step21"


def test_only_steps_that_every_divides_are_branches_and_main_is_the_last_all_the_same(hub, push, run):
    assert push("--run", run, "--repo", "org/sink", "--every", "14")[0] == 0
    repository = hub.repositories["org/sink"]
    assert repository.branches.keys() == {"main", "step14"}
    assert step_of(hub, "main") == 21
    assert repository.files()["revisions.txt"].content == b"step14\n"


def test_what_is_there_is_not_exported_again(hub, push, run):
    """Risk: a run of 150 checkpoints takes hours to find that nothing is to be done."""
    push("--run", run, "--repo", "org/sink")
    hub.log.clear()
    code, _, err = push("--run", run, "--repo", "org/sink")
    assert code == 0
    assert exports(err) == ["step21"], "for main, whose card may have become another"
    assert "nothing has changed" in err
    assert not hub.asked("^PUT|POST .*/(commit|branch|tag)/")


def test_a_checkpoint_that_has_become_another_is_pushed_again(hub, push, run):
    push("--run", run, "--repo", "org/sink")
    checkpoint(14, seed=0.5)
    _, _, err = push("--run", run, "--repo", "org/sink")
    assert exports(err) == ["step14", "step21"]
    assert (step_of(hub, "step14"), step_of(hub, "step7")) == (14.5, 7)
    _, _, err = push("--run", run, "--repo", "org/sink", "--dtype", "bfloat16")
    assert exports(err) == ["step7", "step14", "step21"]
    assert AutoConfig.from_pretrained("org/sink", revision="step7").dtype == torch.bfloat16


def test_a_run_that_is_not_complete_has_its_newest_on_main_and_no_tag(hub, push, run):
    (RUN / "checkpoints" / "step21.ckpt").unlink()
    assert push("--run", run, "--repo", "org/sink")[0] == 0
    assert step_of(hub, "main") == 14
    assert not hub.repositories["org/sink"].tags
    checkpoint(21)
    push("--run", run, "--repo", "org/sink")
    assert (step_of(hub, "main"), [*hub.repositories["org/sink"].tags]) == (21, ["final-step21"])


def test_report_and_results_are_told_of_main_alone(hub, push, run, monkeypatch):
    """Risk: the card of an early checkpoint shows the results of the last one."""
    given = {}

    def make_card(folder, *, report, results, run, **_):
        given[folder.name] = [*given.get(folder.name, []), (report, results, run)]
        return SimpleNamespace(write=lambda output: (output / "README.md").write_text("a card"))

    monkeypatch.setattr("recipes.card.card.make_card", make_card)
    for name in ("a report", "a.json", "b.json"):
        Path(name).touch()
    push("--run", run, "--repo", "org/sink", "--report", "a report", "--results", "a.json", "b.json")
    early = (None, (), run)
    everything = (Path("a report"), (Path("a.json"), Path("b.json")), run)
    assert given == {"step7": [early], "step14": [early], "step21": [early, everything]}


def test_a_dry_run_tells_the_revisions_and_their_size(hub, push, run):
    code, out, _ = push("--run", run, "--repo", "org/sink", "--dry-run")
    size = sum(
        value.numel() * 4
        for value in torch.load(run / "checkpoints" / "step7.ckpt", weights_only=True)["state_dict"].values()
    )
    branches = [f"step{step}  {size / 1000:.0f}kB" for step in (7, 14, 21)]
    assert out.splitlines() == [*branches, "main  step21, and revisions.txt", "final-step21  main, for good"]
    assert not hub.repositories
    push("--run", run, "--repo", "org/sink", "--every", "14")
    hub.log.clear()
    assert push("--run", run, "--repo", "org/sink", "--dry-run")[1].splitlines() == [
        *(branches[0], branches[2], "main  step21, and revisions.txt")
    ]
    push("--run", run, "--repo", "org/sink", "--every", "7")
    hub.log.clear()
    code, out, _ = push("--run", run, "--repo", "org/sink", "--dry-run")
    assert (code, out) == (0, "nothing would be pushed\n")
    assert hub.asked("^GET ") == hub.log


@pytest.mark.parametrize("tied", [False, True])
def test_a_dry_run_tells_the_size_of_the_whole_model_if_a_checkpoint_holds_a_row(push, tied):
    """Risk: 128 B are announced, and a model of gigabytes is pushed."""
    tiny.partial_checkpoint(RUN, tiny.base_folder(Path("base"), "qwen2", tie_word_embeddings=tied))
    (RUN / "config.yaml").write_text("schedule:\n  steps: 7\n")
    size = (export(RUN, Path("whole")) / "model.safetensors").stat().st_size
    code, out, _ = push("--run", RUN, "--repo", "org/sink", "--dry-run")
    number, unit = re.search(r"step7  (\d+)(k?B)", out).groups()
    assert (code, unit) == (0, "kB")
    assert int(number) == pytest.approx(size / 1000, rel=0.05)


def test_what_is_pushed_of_a_frozen_run_is_the_whole_model(hub, push):
    """Risk: the row alone is pushed, which nobody can load; or the base without the row, or without its name."""
    base = tiny.base_folder(Path("base"), "qwen2", license="mit")
    tiny.partial_checkpoint(RUN, base)
    (RUN / "config.yaml").write_text("schedule:\n  steps: 7\n")
    code, _, err = push("--run", RUN, "--repo", "org/sink")
    assert code == 0, err
    expected = load_model(str(RUN))
    pushed, tokenizer = AutoModelForCausalLM.from_pretrained("org/sink"), AutoTokenizer.from_pretrained("org/sink")
    batch = tokenizer("a b c d", return_tensors="pt")
    assert batch.input_ids[0, 0] == expected.sink_ids[0]
    with torch.no_grad():
        assert torch.equal(pushed(**batch).logits, expected.model(**batch).logits)
        plain = load_model(str(base)).model(input_ids=batch.input_ids[:, 1:]).logits
        assert not torch.allclose(pushed(**batch).logits[:, 1:, :300], plain[..., :300], atol=1e-3)
    card = hub.repositories["org/sink"].files()["README.md"].content.decode()
    assert "license: mit" in card
    assert load_base(str(base))[1].fingerprint[:12] in card


# -------------------------------------------------------------------------------------------------------------- breaks


def test_a_break_half_way_says_what_is_up_and_the_rest_follows(hub, push, run):
    """Risk: an interrupted push starts from the beginning, or leaves an export on the disk."""
    hub.trouble("POST .*/commit/step14", times=FOR_EVER, status=500)
    code, _, err = push("--run", run, "--repo", "org/sink")
    assert code == 2
    assert "uploaded: step7; the same command resumes from there" in err.splitlines()[-1]
    assert not WORK.exists()
    hub.troubles.clear()
    code, _, err = push("--run", run, "--repo", "org/sink")
    assert (code, exports(err)) == (0, ["step14", "step21"])
    assert hub.uploads == 3
    assert [step_of(hub, revision) for revision in ("step7", "step14", "step21", "main")] == [7, 14, 21, 21]


def test_there_is_one_export_at_a_time_and_none_at_the_end(hub, push, run):
    """Risk: the exports of a run fill the disk."""
    WORK.mkdir()
    (WORK / "step3").mkdir()
    (WORK / "step3" / "model.safetensors").write_bytes(b"of a push that was killed")
    seen: list[set[str]] = []
    look = lambda: seen.append({path.parent.name for path in WORK.rglob("*.safetensors")})  # noqa: E731
    hub.trouble("PUT /lfs/", times=FOR_EVER, meanwhile=look)
    before = tree(RUN)
    assert push("--run", run, "--repo", "org/sink")[0] == 0
    assert seen == [{"step7"}, {"step14"}, {"step21"}]
    assert not WORK.exists()
    assert tree(RUN) == before, "the run itself is only read"


def test_the_exports_go_where_there_is_room(hub, push, run):
    seen = []
    hub.trouble("PUT /lfs/", meanwhile=lambda: seen.extend(Path("scratch").rglob("*.safetensors")))
    push("--run", run, "--repo", "org/sink", "--workdir", "scratch")
    assert seen
    assert not list(Path("scratch").iterdir())


def test_a_full_disk_is_one_line_and_leaves_nothing(hub, push, run):
    """Risk: the half of an export stays, on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        code, _, err = push("--run", run, "--repo", "org/sink")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert "the disk is full" in err.splitlines()[-1]
    assert exports(err) == ["step7"], "the others would not fit either"
    assert not WORK.exists()


def test_a_damaged_checkpoint_does_not_keep_the_others_back(hub, push, run):
    """Risk: it is pushed as it is; or nothing is pushed because of it; or no message names it."""
    for step in (7, 21):
        with (RUN / "checkpoints" / f"step{step}.ckpt").open("r+b") as file:
            file.seek(5000)
            file.write(b"damage")
    code, _, err = push("--run", run, "--repo", "org/sink")
    assert code == 2
    last = err.splitlines()[-1]
    assert re.search(r"these were not pushed: step7: .*step7.ckpt is not what was written.*; step21: ", last)
    repository = hub.repositories["org/sink"]
    assert repository.branches.keys() == {"main", "step14"}
    assert (step_of(hub, "main"), repository.files()["revisions.txt"].content) == (14, b"step14\n")


def test_a_checkpoint_that_the_run_removes_meanwhile_is_left_out(hub, push, run):
    """Risk: training continues, and `checkpoints.keep` removes a checkpoint that is about to be pushed."""
    hub.trouble("POST .*/commit/step7", meanwhile=(RUN / "checkpoints" / "step14.ckpt").unlink)
    code, _, err = push("--run", run, "--repo", "org/sink")
    assert code == 0
    assert "step14 is left out: the run has removed it" in err
    assert hub.repositories["org/sink"].branches.keys() == {"main", "step7", "step21"}


def test_two_pushes_of_one_run_do_not_meet(hub, push, run):
    program = "import sys; from sinkmodel.locks import locked\nwith locked(__import__('pathlib').Path(sys.argv[1])):"
    program += "\n    print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, WORK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(runs.__file__).parents[2])},
    )
    with holder:
        assert holder.stdout.readline() == b"held\n"
        code, _, err = push("--run", run, "--repo", "org/sink")
        assert code == 2
        assert f"process {holder.pid}" in err.splitlines()[-1]
        holder.stdin.close()
    assert push("--run", run, "--repo", "org/sink")[0] == 0


# ------------------------------------------------------------------------------------------------- while it is training


def test_following_pushes_each_checkpoint_as_it_comes_and_ends_with_the_run(hub, push, run, pauses):
    """Risk: it ends too soon, or never; or takes up a file that is being written."""
    for step in (14, 21):
        (RUN / "checkpoints" / f"step{step}.ckpt").unlink()
    at_the_time = []

    def look() -> None:
        at_the_time.append((*sorted(hub.repositories["org/sink"].branches), step_of(hub, "main")))

    def half_a_checkpoint() -> None:
        (RUN / "checkpoints" / ".step14.ckpt.17.part").write_bytes(b"half")

    pauses.coming += [half_a_checkpoint, look, lambda: checkpoint(14), look, lambda: checkpoint(21)]
    code, out, err = push("--run", run, "--repo", "org/sink", "--follow")
    assert (code, out) == (0, f"{hub.endpoint}/org/sink\n")
    assert at_the_time == [("main", "step7", 7), ("main", "step14", "step7", 14)]
    assert exports(err) == ["step7", "step14", "step21"]
    assert step_of(hub, "main") == step_of(hub, "final-step21") == 21
    assert set(pauses.waited) == {runs.LOOK}
    assert not WORK.exists()
    assert "waiting for a checkpoint of runs/sink; the last one is of step 14" in err


@pytest.mark.parametrize("place", ["config.yaml", "metrics.csv", "checkpoints", "checkpoints/step21.ckpt"])
def test_a_link_out_of_a_run_is_refused(hub, push, run, place):
    """Risk: somebody else's checkpoint or numbers are published through a link."""
    (run / "metrics.csv").write_text("step,tokens,twin_loss\n7,100,3.0\n")
    (run / place).rename("elsewhere")
    (run / place).symlink_to(Path("elsewhere").resolve())
    code, out, err = push("--run", run, "--repo", "org/sink")
    assert (code, out) == (2, "")
    assert f"{run / place}" in err.splitlines()[-1]
    assert f"leads out of {run}, to " in err.splitlines()[-1]
    repository = hub.repositories.get("org/sink")
    assert repository is None or not any("model.safetensors" in repository.files(name) for name in repository.branches)


def test_following_looks_at_the_links_of_each_new_checkpoint(hub, push, run, pauses):
    Path("elsewhere").mkdir()
    last = run / "checkpoints" / "step21.ckpt"
    last.rename("elsewhere/step21.ckpt")
    pauses.coming += [lambda: last.symlink_to(Path("elsewhere/step21.ckpt").resolve())]
    code, _, err = push("--run", run, "--repo", "org/sink", "--follow")
    assert code == 2
    assert f"{last} leads out of {run}, to " in err.splitlines()[-1]
    assert step_of(hub, "main") == 14


def test_following_begins_before_the_first_checkpoint(hub, push, pauses):
    RUN.mkdir(parents=True)
    (RUN / "config.yaml").write_text("schedule:\n  steps: 7\n")
    pauses.coming += [lambda: None, lambda: checkpoint(7)]
    assert push("--run", RUN, "--repo", "org/sink", "--follow")[0] == 0
    assert step_of(hub, "main") == 7


def test_following_outlives_a_hub_that_is_away(hub, push, run, pauses):
    """Risk: the night in which the Hub is away for an hour ends the push of a run of days."""
    hub.trouble("GET .*/refs", after=3, times=2, status=503)
    pauses.coming += [lambda: None] * 2
    code, _, err = push("--run", run, "--repo", "org/sink", "--follow")
    assert code == 0
    assert pauses.waited == [runs.PATIENCE] * 2
    assert "fails (a trouble of the server); trying again in 60 s" in err
    assert exports(err)[-1] == "step21"
    assert [step_of(hub, revision) for revision in ("step7", "step14", "step21", "main")] == [7, 14, 21, 21]


def test_following_ends_where_the_hub_refuses(hub, push, run, pauses):
    hub.trouble("POST .*/commit/step14", status=403)
    code, _, err = push("--run", run, "--repo", "org/sink", "--follow")
    assert code == 2
    assert "your token may not write to org/sink" in err.splitlines()[-1]


@pytest.fixture
def as_at_a_terminal():
    """SIGINT arrives, although a script that starts these tests in the background makes its children ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("as_at_a_terminal")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("moment", ["waiting", "sending"])
def test_a_signal_ends_it_cleanly_and_it_goes_on(hub, push, run, pauses, number, code, moment):
    """Risk: an export stays, or the next start finds a lock; or SIGTERM is taken for a failure of the Hub."""
    (RUN / "checkpoints" / "step21.ckpt").unlink()
    handlers = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
    if moment == "waiting":
        pauses.coming.append(lambda: os.kill(os.getpid(), number))
    else:
        hub.trouble("POST .*/commit/step14", meanwhile=lambda: os.kill(os.getpid(), number))
    ended, out, err = push("--run", run, "--repo", "org/sink", "--follow")
    assert (ended, out) == (code, "")
    assert ("stopped by SIGTERM" if code == 143 else "interrupted") in err.splitlines()[-1]
    assert not WORK.exists()
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == handlers
    checkpoint(21)
    assert push("--run", run, "--repo", "org/sink", "--follow")[0] == 0
    assert [step_of(hub, revision) for revision in ("step7", "step14", "step21", "main")] == [7, 14, 21, 21]


@pytest.mark.slow
def test_a_run_that_really_trains_is_followed_to_its_end(hub, push, data, monkeypatch):
    """Risk: the two are in each other's way: one cleans up what the other writes, or removes what it reads."""
    monkeypatch.setattr(runs, "LOOK", 0.05)
    process = start_process(data, RUN.resolve(), checkpoints__every=4)
    while not (RUN / "config.yaml").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    code, _, err = push("--run", RUN, "--repo", "org/sink", "--follow")
    assert (process.wait(), code) == (0, 0), process.stderr.read() + err
    repository = hub.repositories["org/sink"]
    for branch in ("main", *(name for name in repository.branches if name != "main")):
        step = int(branch.removeprefix("step")) if branch != "main" else 40
        assert json.loads(repository.files(branch)["training.json"].content)["step"] == step
    export(RUN, Path("last"))
    assert repository.files()["model.safetensors"].content == Path("last/model.safetensors").read_bytes()
    assert "figures/loss.png" in repository.files()
    assert "final-step40" in repository.tags
