"""Guards: Ctrl-C ends `sink-prepare` at once, whatever its processes do at that moment, and none of them is left."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.recipes.corpus import tree, write_tokenizer

LETTERS = 12_000_000  # without a space: Rust takes far more than PATIENCE to learn from them, or to encode them
PATIENCE = 5.0


@pytest.fixture
def prepare(tmp_path):
    """Start the command on one long stretch; every process of it is gone when the test ends."""
    table = bytes(ord("a") + byte % 26 for byte in range(256))
    (tmp_path / "long.txt").write_bytes(random.Random(0).randbytes(LETTERS).translate(table))
    started = []

    def start(*more):
        argv = ["--input", str(tmp_path / "long.txt"), "--output", str(tmp_path / "out"), "--workers", "2"]
        argv += ["--validation-fraction", "0", "--test-fraction", "0"]
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "recipes.prepare", *argv, *more],
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                preexec_fn=hear_interrupts,
            )
        )
        return started[-1]

    yield start
    for process in started:
        for pid in [process.pid, *members(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def hear_interrupts():
    """SIGINT is ignored by all that a script starts in its background, these tests perhaps."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def members(session):
    """The processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def workers(process, seconds=1.5):
    """The processes that the command started and that have used `seconds` of a processor; by 1.5, Rust is at work."""
    busy = []
    for pid in members(process.pid):
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        if pid != process.pid and sum(map(int, times)) / os.sysconf("SC_CLK_TCK") > seconds:
            busy.append(pid)
    return busy


def interrupt(process, everyone, when):
    """Send Ctrl-C, to the command or, as a terminal does, to all of its processes; returns what was printed."""
    deadline = time.monotonic() + 60
    while not when() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    (os.killpg if everyone else os.kill)(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    until = time.monotonic() + PATIENCE
    while members(process.pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not members(process.pid)
    return printed


@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize("seconds", [0.05, 0.15, 1.5])
def test_while_a_tokenizer_is_trained(prepare, tmp_path, everyone, seconds):
    """Risk: Rust holds the main thread, so Ctrl-C waits until the tokenizer is trained; a traceback of a process."""
    process = prepare("--vocabulary-size", "8192")
    assert "training a byte-level BPE" in process.stderr.readline()
    assert interrupt(process, everyone, lambda: workers(process, seconds)) == "sink-prepare: interrupted\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("everyone", [False, True])
def test_while_long_stretches_are_encoded(prepare, tmp_path, everyone):
    """Risk: Ctrl-C waits for all that the workers have been given, a minute of DNA for instance."""
    process = prepare("--tokenizer", str(write_tokenizer(tmp_path / "tokenizer.json")))
    assert interrupt(process, everyone, lambda: workers(process)) == "sink-prepare: interrupted\n"
    assert tree(tmp_path).keys() == {"long.txt", "tokenizer.json"}
