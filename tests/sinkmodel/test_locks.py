"""Guards: one writer a folder, across machines too, and no dead one that keeps a folder for good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from sinkmodel import locks
from sinkmodel.errors import UserError
from sinkmodel.locks import DEAD, LOCK, locked

THERE = {"host": "n7", "pid": 41, "job": "1234"}


def left_behind(folder, holder, silent: float) -> None:
    (folder / LOCK).write_text(json.dumps(holder))
    then = time.time() - silent
    os.utime(folder / LOCK, (then, then))


def test_a_process_of_this_machine_that_was_killed_leaves_no_lock(tmp_path):
    program = "import sys, time; from sinkmodel.locks import locked; from pathlib import Path\n"
    program += "with locked(Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    with pytest.raises(UserError, match=f"process {process.pid} on .* is writing to"), locked(tmp_path):
        raise AssertionError("the block must not run")
    process.kill()
    process.wait()
    assert (tmp_path / LOCK).exists()
    start = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - start < DEAD / 2, "there is nothing to wait for"
    assert not list(tmp_path.iterdir())


@pytest.fixture
def quick(monkeypatch):
    """A lock that gives signs of life, and looks for them, often."""
    monkeypatch.setattr(locks, "BEAT", 0.1)
    monkeypatch.setattr(locks, "DEAD", 3.0)


def test_a_living_holder_on_another_machine_is_respected(tmp_path, monkeypatch, quick, capsys):
    monkeypatch.setattr(locks, "DEAD", 60.0)
    left_behind(tmp_path, THERE, silent=1)
    alive = threading.Event()
    threading.Timer(1.0, lambda: (alive.set(), os.utime(tmp_path / LOCK))).start()
    with pytest.raises(UserError, match=r"process 41 on n7, job 1234 is writing to"), locked(tmp_path):
        raise AssertionError("the block must not run")
    assert alive.is_set(), "before it gave a sign of life, it could have been dead"
    assert json.loads((tmp_path / LOCK).read_text()) == THERE
    stderr = capsys.readouterr().err
    assert stderr.count("is held by process 41 on n7, job 1234, silent for 1 s: waiting for a sign of life, 59 s") == 1


def test_one_that_died_a_moment_ago_is_waited_for(tmp_path, quick, capsys):
    """Risk: a job that is submitted in place of one whose node has died ends at once, and nobody is there to see."""
    left_behind(tmp_path, THERE, silent=1)
    start = time.monotonic()
    with locked(tmp_path):
        assert 1 < time.monotonic() - start < 30
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert "taking it over" in capsys.readouterr().err


def test_one_that_ends_while_it_is_waited_for_leaves_the_folder_to_us(tmp_path, monkeypatch, quick):
    """Risk: we hold a file that is no longer there, and so does the next one."""
    monkeypatch.setattr(locks, "DEAD", 60.0)
    left_behind(tmp_path, THERE, silent=1)
    threading.Timer(0.5, (tmp_path / LOCK).unlink).start()
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_dead_one_is_not(tmp_path, capsys):
    left_behind(tmp_path, THERE, silent=DEAD + 1)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert "held by process 41 on n7, job 1234, silent for 3 minutes: taking it over" in capsys.readouterr().err


def test_a_job_that_was_requeued_to_another_machine_takes_over_at_once(tmp_path, monkeypatch):
    left_behind(tmp_path, THERE, silent=0)
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    start = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - start < DEAD / 2


def test_a_lock_that_was_cut_short_by_a_kill_is_no_holder(tmp_path):
    (tmp_path / LOCK).write_text('{"host": "n7", ')
    with locked(tmp_path):
        pass


def test_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.01)
    with locked(tmp_path):
        os.utime(tmp_path / LOCK, (1, 1))
        until = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert (tmp_path / LOCK).stat().st_mtime > 2


def test_a_holder_that_was_taken_over_ends_before_it_writes_once_more(tmp_path):
    program = "import json, sys, time; from sinkmodel import locks; from pathlib import Path\n"
    program += "locks.BEAT = 0.05; folder = Path(sys.argv[1])\n"
    program += f"with locks.locked(folder): (folder / '.lock').write_text(json.dumps({THERE})); time.sleep(30)"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert "was taken over by process 41 on n7, job 1234" in done.stderr
    assert json.loads((tmp_path / LOCK).read_text()) == THERE, "it is the other's now"


@pytest.mark.parametrize("times", [1, 100])
def test_a_lock_on_a_file_that_its_last_holder_removed_is_no_lock(tmp_path, monkeypatch, times):
    """We take the new one; and do not try for ever."""
    left = [None] * times

    def released_meanwhile(file, how):
        if left:
            left.pop()
            (tmp_path / LOCK).unlink()

    monkeypatch.setattr("fcntl.lockf", released_meanwhile)
    if times == 1:
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    else:
        with pytest.raises(UserError, match="another process is writing"), locked(tmp_path):
            raise AssertionError("the block must not run")
