"""Guards: a run is one wandb run, each step once, online or synced from what kills have left; wandb stops no run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recipes import log
from recipes.pretrain import main
from recipes.training.logs.wandb_files import HEADER, files_of, history, mend, records
from recipes.training.logs.wandb_run import WandbRun, identity_of
from recipes.training.settings import LoggingSettings
from sinkmodel.checkpoint import checkpoint_steps
from tests.kills import children_of
from tests.recipes.logged import curves, forget, logged_steps, records_of, uploaded
from tests.recipes.runs import arguments, complete, start_process, train, wait_for_checkpoint
from tests.recipes.wandb_server import KEY, wandb_server


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A wandb server that this process and those that it starts talk to."""
    with wandb_server() as started:
        for name, value in {**started.environment, "HOME": str(tmp_path / "home")}.items():
            monkeypatch.setenv(name, value)
        wandb.teardown()  # what it has learned from another environment
        yield started
    wandb.teardown()


def part(content: bytes, kind: int) -> bytes:
    return b"crc!" + len(content).to_bytes(2, "little") + bytes([kind]) + content


def wandbs_processes(parent: int) -> list[int]:
    return [pid for pid in children_of(parent) if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize("left", [0, 1, 6, 7, 8, 500])
def test_a_wandb_file_is_read_over_the_borders_of_its_blocks_and_up_to_where_a_kill_has_cut_it(left):
    """Risk: a part at a border is misread, and the steps after it are logged a second time. `left`: in the block."""
    first = b"a" * (32768 - 7 - 7 - left)
    head = HEADER + part(first, 1)
    if left >= 7:
        second = b"b" * (left - 7) + b"c" * 32761 + b"d" * 5
        body = part(second[: left - 7], 2) + part(b"c" * 32761, 3) + part(b"d" * 5, 4)
    else:
        second = b"b" * 9
        body = b"\0" * left + part(second, 1)
    whole = head + body + part(b"last", 1)
    ends = len(head), len(head + body), len(whole)
    assert list(records(whole)) == list(zip([first, second, b"last"], ends))
    assert list(records(whole[:-1])) == list(zip([first, second], ends))
    assert list(records((head + body)[:-1])) == [(first, ends[0])]
    assert list(records(whole[:20])) == list(records(b"")) == list(records(b"something else")) == []


@pytest.mark.slow
def test_offline_folders_of_a_run_that_was_killed_have_each_step_once(data, tmp_path):
    """A SIGKILL to the whole job, wandb's own process too, takes lines that were logged and not yet written."""
    run, settings = tmp_path / "run", {"logging__wandb": True, "logging__every": 1}
    process = start_process(data, run, **settings)
    wait_for_checkpoint(process, run, 14)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    train(data, run, **settings)
    assert logged_steps(run) == list(range(1, 41))


@pytest.mark.slow
def test_wandb_sync_makes_one_run_of_the_offline_folders_that_kills_have_left(data, tmp_path, server, monkeypatch):
    """Risk: it stops at a file whose end is missing, and no later start is ever uploaded."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, settings = tmp_path / "run", {"logging__wandb": True, "logging__every": 1}
    for resumed_from, left in ((14, -100), (28, 7), (35, 0)):  # bytes: all but the last, a header, all
        train(data, run, **settings)
        forget(run, above=resumed_from)
        path = max((run / "wandb").glob("offline-run-*/*.wandb"))
        content = path.read_bytes()
        path.write_bytes(content[:left] if left else content)
        time.sleep(1)  # its name has the second of its start
    train(data, run, **settings)
    assert logged_steps(run) == list(range(1, 41))
    monkeypatch.setenv("WANDB_MODE", "online")
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 3
    sync = Path(sys.executable).with_name("wandb")
    done = subprocess.run([sync, "sync", "--yes", *folders], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, "ERROR" in done.stderr) == (0, False), done.stderr

    ((identity, held),) = server.runs.items()
    assert json.loads((run / "checkpoints" / "wandb.json").read_text())["id"] == identity
    clock = ("tokens_per_second", "mfu")  # steps that were done twice have those of the first time
    rows, expected = (
        [{k: line[k] for k in line if k not in clock} for line in of] for of in (uploaded(held), curves(run))
    )
    assert rows == expected
    assert held.bucket["displayName"] == "run"
    assert held.bucket["tags"] == ["sink-token", "gpt_neox-2x32", "data"]
    assert held.bucket["groupName"].startswith("gpt_neox-2x32-data-")
    assert held.config["optimizer"]["lr"] == 3e-3
    assert held.config["parameters"] == 41_728
    assert len(held.config["data"]["fingerprint"]) == 64
    axes = {metric.get("1", metric.get("2")): metric.get("5") for metric in held.config["_wandb"]["m"]}
    assert axes == {"tokens": None, "*": 1}, "the first is the axis of all"


@pytest.mark.parametrize(("step", "preempting", "code"), [(20, 1, 1), (40, 0, 0)])
def test_a_run_that_was_stopped_is_preempted_for_wandb_and_not_finished(tmp_path, step, preempting, code):
    mirror = WandbRun(tmp_path, LoggingSettings(wandb=True), False, 40, config={}, group="g", tags=[])
    mirror.log_metrics({"tokens": 1.0}, step)
    mirror.finalize("success")
    assert len(records_of(tmp_path, "preempting")) == preempting
    (end,) = records_of(tmp_path, "exit")
    assert end.exit_code == code
    assert not wandbs_processes(os.getpid()), "it may still write, and our process may end without waiting for it"


@pytest.mark.slow
def test_several_ranks_are_one_wandb_run_and_one_file_of_tensorboard_both_complete(data, tmp_path):
    """Risk: the processes end before wandb's own has written the last lines."""
    run = tmp_path / "run"
    complete(data, run, schedule__steps=6, logging__every=1, logging__wandb=True, logging__tensorboard=True)
    (path,) = (run / "wandb").glob("offline-run-*/*.wandb")
    assert [step for step, _ in history(path)] == [1, 2, 3, 4, 5, 6]
    (path,) = (run / "tensorboard").iterdir()
    assert len(EventAccumulator(str(path)).Reload().Scalars("loss")) == 6


def test_a_server_that_is_silent_holds_up_the_end_of_a_run_no_longer_than_a_job_has(tmp_path, server, monkeypatch):
    """Risk: the time after SLURM's signal runs out in an upload, and the job does not go back to the queue."""
    monkeypatch.setattr("recipes.training.logs.wandb_run.PATIENCE", 1.0)
    mirror = WandbRun(tmp_path, LoggingSettings(wandb=True), False, 40, config={}, group="g", tags=[])
    server.awake.clear()
    mirror.log_metrics({"tokens": 1.0}, 20)
    start = time.monotonic()
    mirror.finalize("success")
    assert 1.0 < time.monotonic() - start < 15
    (path,) = files_of(tmp_path, identity_of(tmp_path))
    assert [step for step, _ in history(path)] == [20], "kept on disk"


@pytest.mark.slow
def test_online_a_resumed_run_goes_on_and_is_level_with_its_metrics(data, tmp_path, server, capsys):
    run = tmp_path / "run"
    train(data, run, logging__wandb=True)
    forget(run, above=28)
    (held,) = server.runs.values()
    held.lines = {place: line for place, line in held.lines.items() if line["_step"] <= 20}  # the rest never arrived
    held.summary = json.dumps({"_step": 20})
    train(data, run, logging__wandb=True)
    assert [row["step"] for row in uploaded(held)] == list(range(5, 41, 5))
    assert [row["loss"] for row in uploaded(held)] == [line["loss"] for line in curves(run)]
    assert held.exits == [0, 0]
    stderr = capsys.readouterr().err
    assert f"wandb: {server.url}/me/sinkmodel/runs/" in stderr
    assert KEY not in stderr


@pytest.mark.slow
def test_wandb_that_does_not_let_us_in_is_refused_at_the_start_and_survived_by_a_resume(
    data, tmp_path, server, capsys, monkeypatch
):
    run = tmp_path / "run"
    server.refuses = True
    for argv in (["--dry-run"], []):
        assert main([*arguments(data, run, logging__wandb=True), *argv]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("sink-pretrain: wandb cannot be used: Failed to authenticate")
        assert message.endswith("set WANDB_MODE=offline to upload later, or leave logging.wandb out")
    assert not checkpoint_steps(run)
    monkeypatch.delenv("WANDB_API_KEY")
    wandb.teardown()
    assert main(arguments(data, run, logging__wandb=True)) == 2
    assert "wandb cannot be used: there is no key for http://127.0.0.1" in capsys.readouterr().err
    train(data, run)
    forget(run, above=35)
    train(data, run, logging__wandb=True)
    stderr = capsys.readouterr().err
    assert "this start logs offline" in stderr
    assert f"wandb sync {run}/wandb/offline-run-*" in stderr
    assert logged_steps(run) == list(range(5, 41, 5)), "the whole run, wandb asked for late"
    assert KEY not in "".join(file.read_text(errors="replace") for file in run.rglob("*") if file.is_file())


@pytest.mark.slow
def test_when_wandbs_process_dies_the_run_goes_on(data, tmp_path, capfd):
    run = tmp_path / "run"
    process = start_process(data, run, logging__wandb=True, schedule__steps=150, logging__every=1)
    wait_for_checkpoint(process, run, 7)
    (pid,) = wandbs_processes(process.pid)
    os.kill(pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stderr.count("wandb failed at step") == 1
    assert max(checkpoint_steps(run)) == 150


def test_a_file_of_another_version_of_wandb_is_left_as_it_is(tmp_path):
    """Risk: a log that is taken for empty, because it cannot be read here, is removed with all that was in it."""
    files = {}
    for start, content in (("1", b""), ("2", HEADER), ("3", b":W&B\xe1\xbe\x01" + b"x" * 100)):
        files[start] = tmp_path / "wandb" / f"offline-run-{start}-abcd" / "run-abcd.wandb"
        files[start].parent.mkdir(parents=True)
        files[start].write_bytes(content)
    mend(tmp_path, "abcd")
    assert [path.exists() for path in files.values()] == [False, False, True]
    assert files["3"].read_bytes().endswith(b"x" * 100)


@pytest.mark.parametrize(("name", "value"), [("WANDB_DISABLED", "TRUE"), ("WANDB_MODE", "disabled")])
def test_wandb_that_the_environment_switches_off_stops_nothing_and_is_named(
    data, tmp_path, capsys, monkeypatch, name, value
):
    """Risk: a run ends because it has no key for what nobody wants, or says that it has logged and has not."""
    run = tmp_path / "run"
    monkeypatch.setenv(name, value)
    quick = {"schedule__steps": 2, "logging__every": 1, "logging__wandb": True}
    assert main([*arguments(data, run, **quick), "--dry-run"]) == 0
    assert f"metrics.csv; not wandb, as {name}={value} switches it off" in capsys.readouterr().out
    train(data, run, **quick)
    assert f"{name}={value} switches wandb off: nothing is logged there" in capsys.readouterr().err
    assert not (run / "wandb").exists()
    assert log.main(["--run", str(run)]) == 2
    assert f"{name}={value} switches wandb off, so nothing can be logged there" in capsys.readouterr().err
    monkeypatch.setenv(name, "offline" if name == "WANDB_MODE" else "false")
    assert log.main(["--run", str(run)]) == 0
    assert logged_steps(run) == [1, 2], "nothing is lost"


def test_a_mode_that_wandb_does_not_have_is_a_mistake_in_one_line(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    wandb.teardown()
    assert main([*arguments(data, tmp_path / "run", logging__wandb=True), "--dry-run"]) == 2
    stderr = capsys.readouterr().err
    assert "wandb cannot be used: mode Input should be 'online', 'offline'" in stderr
    assert "Traceback" not in stderr
    wandb.teardown()
