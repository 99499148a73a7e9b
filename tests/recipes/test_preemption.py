"""Guards: a signal is noted from the first moment on, and a job that was asked to go comes back by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from recipes.training.callbacks.preemption import requeue
from recipes.training.processes import signals
from tests.recipes.runs import start_process, wait_for_checkpoint


def test_within_the_block_a_signal_is_noted_and_nothing_else(capfd):
    before = signal.getsignal(signal.SIGUSR1)
    with signals.noted():
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGUSR1, "the first one"
    assert signal.getsignal(signal.SIGUSR1) == before
    assert capfd.readouterr().err.count("saving at the end of this step") == 1


def test_ctrl_c_ends_at_once_before_there_is_anything_to_save_and_when_it_comes_twice():
    def interrupt(times: int, training: bool) -> None:
        with signals.noted():
            signals.training = training
            for number in range(1, times + 1):
                os.kill(os.getpid(), signal.SIGINT)
                seen.append(number)

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt(1, training=False)
    assert seen == []
    with pytest.raises(KeyboardInterrupt):
        interrupt(3, training=True)
    assert seen == [1], "the first is noted, the second ends it"
    assert signals.received is None, "the next block begins without a signal"


def test_the_handlers_are_there_before_torch_is_loaded():
    """A job may be preempted while it starts, and loading torch from a shared file system takes minutes."""
    program = (
        "import signal, sys\n"
        "import recipes.config\n"
        "import recipes.pretrain\n"
        "def look(*args):\n"
        "    handler = signal.getsignal(signal.SIGUSR1)\n"
        "    print('torch' in sys.modules, getattr(handler, '__module__', handler))\n"
        "    raise SystemExit\n"
        "recipes.config.load_config = look\n"
        "recipes.pretrain.main([])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False recipes.training.processes.signals\n", done.stderr


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A double that writes down how it was called; `state` and `requeue` decide what it answers."""
    path = tmp_path / "scontrol"
    path.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/calls\n'
        f'[ "$1" = show ] && cat {tmp_path}/state && exit 0\n'
        f". {tmp_path}/requeue\n"
    )
    path.chmod(0o755)
    (tmp_path / "state").write_text("JobId=17 JobName=sink\n   JobState=RUNNING Reason=None\n")
    (tmp_path / "requeue").write_text("exit 0\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    return tmp_path


def calls(folder) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_a_running_job_is_put_back_into_the_queue(scontrol, capsys):
    requeue()
    assert calls(scontrol) == ["show job 17", "requeue 17"]
    assert "job 17 is back in the queue" in capsys.readouterr().err


def test_a_job_that_its_user_cancelled_is_not(scontrol, capsys):
    (scontrol / "state").write_text("JobId=17\n   JobState=CANCELLED Reason=None\n")
    requeue()
    assert calls(scontrol) == ["show job 17"]
    assert "job 17 is CANCELLED: it is not returned" in capsys.readouterr().err


def test_where_it_cannot_be_put_back_the_user_is_told_what_to_do(scontrol, capsys, monkeypatch):
    (scontrol / "requeue").write_text("echo 'Requested operation is presently disabled' >&2; exit 1\n")
    requeue()
    stderr = capsys.readouterr().err
    assert "could not be returned to the queue (Requested operation is presently disabled); submit it again" in stderr
    monkeypatch.setenv("PATH", "")
    requeue()
    assert "submit it again: it resumes where it stopped" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGINT, False)])
def test_a_run_that_was_stopped_asks_for_the_queue_when_it_is_saved(data, scontrol, tmp_path, number, requeued):
    """Risk: it ends for good; or what its user has stopped comes back."""
    run = tmp_path / "run"
    process = start_process(data, run, schedule__steps=100_000)
    wait_for_checkpoint(process, run, 7)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number, stderr
    assert (scontrol / "calls").exists() == requeued
    if requeued:
        assert calls(scontrol) == ["show job 17", "requeue 17"]
        assert stderr.index("stopped at step") < stderr.index("job 17 is back in the queue")


def test_outside_of_slurm_there_is_no_queue(scontrol, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID")
    requeue()
    assert not (scontrol / "calls").exists()
