"""Risk: a script that nobody has run fails on its first GPU, where time is scarce. All of it runs here, tiny."""

from __future__ import annotations

import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from bench.gpu import __main__ as measurements
from bench.gpu import evidence, machine, rehearsal
from bench.gpu.pack import main as pack_main
from bench.gpu.pack import unpack
from sinkmodel.errors import UserError
from sinkmodel.files import read_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_measurement_runs_and_leaves_a_result_that_is_not_measured_again(tmp_path, capfd, monkeypatch):
    assert machine.REHEARSE, "tests/conftest.py sets it"
    assert measurements.main(["--output", str(tmp_path)]) == 0
    assert {file.stem for file in tmp_path.glob("*.json")} == set(measurements.MEASUREMENTS)
    shown = capfd.readouterr().out
    for word in ("mfu:", "StreamingCache takes", "is the fastest", "prefill, rehearsal in float32"):
        assert word in shown
    monkeypatch.setattr(machine, "DEVICE", None)  # whatever measures now fails
    assert measurements.main(["scoring", "--output", str(tmp_path)]) == 0
    assert capfd.readouterr().out.strip() in shown


def test_a_measurement_that_fails_costs_no_other(tmp_path, monkeypatch, capfd):
    def fails() -> dict:
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(measurements, "MEASUREMENTS", {"a": (fails, str), "b": (lambda: {"x": 1}, str)})
    assert measurements.main(["--output", str(tmp_path)]) == 1
    printed = capfd.readouterr()
    assert "out of memory, say" in printed.err
    assert "failed: a;" in printed.err
    assert printed.out == "{'x': 1}\n"
    assert measurements.main(["c", "--output", str(tmp_path)]) == 2


@pytest.mark.slow
def test_evidence_is_made_from_one_file_and_is_one_small_archive(tmp_path, capfd):
    text = rehearsal.write_documents(tmp_path / "text.jsonl")
    archive, output = tmp_path / "data.tar.xz", tmp_path / "gpu"
    assert pack_main([str(archive), "--input", str(text), *rehearsal.PREPARE]) == 0
    assert evidence.main(["--data", str(archive), "--output", str(output)]) == 0
    assert "left: nothing" in capfd.readouterr().err
    with tarfile.open(output / "results.tar.xz") as tar:
        names = set(tar.getnames())
        tar.extractall(tmp_path, filter="data")
    assert {f"results/{name}" for name in ("verify-16.json", "sinks-none.json", "token/metrics.csv")} <= names
    assert not any(name.endswith(".ckpt") for name in names)
    assert read_json(tmp_path / "results" / "verify-16.json")["verdict"]["answer"]
    assert (tmp_path / "results" / "parts.log").read_text().count(", done on ") == 5
    assert (output / "results.tar.xz").stat().st_size < 100_000


def test_a_file_that_is_not_evidence_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"does not exist; make it with"):
        unpack(tmp_path / "none.tar.xz", tmp_path)
    (tmp_path / "broken.tar.xz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"broken.tar.xz cannot be unpacked"):
        unpack(tmp_path / "broken.tar.xz", tmp_path)
    (tmp_path / "data.sha256").write_text("of another file")
    with pytest.raises(UserError, match=r"holds runs on other data than .*broken.tar.xz; choose another OUTPUT"):
        unpack(tmp_path / "broken.tar.xz", tmp_path)
    assert pack_main(["--input", "x"]) == 2


# ------------------------------------------------------------------------------------------------------------- parts


class Work:
    """A stage that takes so many seconds, and saves if asked to; it counts its calls."""

    def __init__(self, name: str, seconds: float, saves: bool = False):
        self.left, self.finished, self.calls = seconds, False, 0
        self.stage = evidence.Stage(name, self.run, lambda: self.finished, saves)

    def run(self) -> int:
        self.calls += 1
        asked: list[int] = []
        before = signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
        left = self.left
        try:
            while left > 0 and not asked:
                time.sleep(0.01)
                left -= 0.01
        finally:
            signal.signal(signal.SIGUSR1, before)
        if asked:
            self.left = left
            return evidence.STOPPED
        self.finished = True
        return 1  # as verify does, if the answer is "worse"


def run_part(works: list[Work], seconds: float, monkeypatch) -> tuple[int, list[str]]:
    monkeypatch.setattr(evidence, "SAVING", 0.05)
    lines: list[str] = []
    code = evidence.part([work.stage for work in works], seconds, lines.append)
    return code, lines


def test_parts_continue_each_other(monkeypatch):
    """Risk: training begins anew in every part, or a part outlasts its time."""
    training, verdict = Work("train", 0.6, saves=True), Work("verify", 0.05)
    started = time.monotonic()
    code, lines = run_part([training, verdict], 0.4, monkeypatch)
    assert (code, lines) == (evidence.UNFINISHED, ["train: 0 s, not done yet"])
    assert time.monotonic() - started < 2
    assert not verdict.calls
    for _ in range(10):
        code, lines = run_part([training, verdict], 1.0, monkeypatch)
        if code == 0:
            break
    assert lines[-1] == "verify: 0 s, done", "exit code 1 is an answer, if there is a result"
    assert run_part([training, verdict], 1.0, monkeypatch) == (0, [])


def test_an_evaluation_is_broken_off_and_is_the_first_of_the_next_part(monkeypatch):
    """Risk: a part waits for an evaluation that it has no time for, or never comes to an end of it."""
    first, long = Work("train", 0.2), Work("verify", 30)
    code, lines = run_part([first, long], 1.0, monkeypatch)
    assert (code, lines[-1]) == (evidence.UNFINISHED, "verify: 1 s, not done yet")
    code, lines = run_part([first, long], 0.2, monkeypatch)
    assert code == 1
    assert "verify takes longer than a part of 0.0 minutes; give more with --minutes" in lines[-1]


def test_a_stage_that_leaves_no_result_has_failed(monkeypatch):
    broken = evidence.Stage("sinks", lambda: 2, lambda: False)
    lines: list[str] = []
    assert evidence.part([broken], 60, lines.append) == 2
    assert lines == ["sinks: 0 s, failed with exit code 2"]


def test_the_targets_run_what_is_rehearsed_here():
    """Risk: the Makefile's lines go another way than these tests."""
    call = ["make", "--dry-run", "REHEARSE=1", "GPU_PYTHON=python3", "test-gpu", "bench-gpu", "evidence-gpu"]
    env = {**os.environ, "MAKEFLAGS": ""}
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True, env=env)
    lines = " ".join(done.stdout.replace("\\\n", " ").split())
    for line in (
        "REHEARSE=1 python3 -m pytest -rs -m gpu --confcutdir tests/gpu tests/gpu",
        "REHEARSE=1 python3 -m bench.gpu --output runs/rehearsal",
        f"python3 -m bench.gpu.pack runs/rehearsal/data.tar.xz --input runs/rehearsal/text.jsonl "
        f"{' '.join(rehearsal.PREPARE)}",
        "REHEARSE=1 python3 -m bench.gpu.evidence --data runs/rehearsal/data.tar.xz --output runs/rehearsal",
    ):
        assert line in lines
