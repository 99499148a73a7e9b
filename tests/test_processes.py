"""Guards: a process that is forked for a test is, to our code, one that was started."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from recipes.training.processes.launch import launch
from tests.processes import ROOMS, Program

NAME = "tests.test_processes"


def seen() -> dict[str, object]:
    """What differs between processes that have had different lives."""
    ours = {name for name in sys.modules if name.partition(".")[0] in ROOMS}
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ASKED")
    return {
        "words": sys.argv[1:],
        "modules": sorted(ours - {"tests.processes"}),
        "folder": os.getcwd(),
        "environment": {name: os.environ.get(name) for name in names},
        "handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "threads": [thread.name for thread in threading.enumerate()],
        "starts": multiprocessing.get_start_method(),
        "process": multiprocessing.current_process().name,
        "leads": os.getsid(0) == os.getpid(),
    }


def main(what: str, where: str) -> int:
    if what == "launch":
        return launch(NAME, ["write", where], 2)
    if what == "write":
        Path(f"{where}{os.environ.get('RANK', '')}").write_text(json.dumps(seen()))
    elif what == "raise":
        raise ValueError("as the test asked")
    elif what == "wait":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        Path(where).touch()
        time.sleep(60)
    elif what == "end":
        raise SystemExit(where)
    return 3


@pytest.mark.parametrize("what", ["write", "launch"])
def test_it_sees_what_a_started_process_sees(tmp_path, monkeypatch, what):
    """Its ranks too, which its launcher forks with handlers of its own."""
    monkeypatch.setenv("ASKED", "yes")
    process = Program(NAME, [what, f"{tmp_path}/forked"])
    assert process.wait(60) == 3, process.stderr.read()
    started = subprocess.run([sys.executable, "-m", NAME, what, f"{tmp_path}/started"], start_new_session=True)
    assert started.returncode == 3
    for rank in ("",) if what == "write" else ("0", "1"):
        forked, started = ((tmp_path / f"{name}{rank}").read_text() for name in ("forked", "started"))
        assert json.loads(forked.replace("/forked", "/started")) == json.loads(started)
        assert json.loads(started)["environment"]["ASKED"] == "yes"


def test_it_ends_as_a_started_process_does(tmp_path):
    ends = {"raise": (1, "ValueError: as the test asked"), "end": (1, "why it ends")}
    for what, (code, last_line) in ends.items():
        process = Program(NAME, [what, "why it ends"])
        _, stderr = process.communicate(60)
        assert (process.returncode, stderr.splitlines()[-1]) == (code, last_line)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_it(tmp_path, number):
    process = Program(NAME, ["wait", str(tmp_path / "there")])
    while not (tmp_path / "there").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == -number


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
