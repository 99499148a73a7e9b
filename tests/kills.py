"""Kill one run at random moments, again and again, and compare what comes out with the run that nobody touched.

    python -m tests.kills [--kills 50] [--seed 0] [--processes 2] [--strategy ddp] [--steps 4000]

A kill is SIGKILL, SIGTERM or SIGUSR1, to the launcher, to one rank or to all of them, sometimes twice, while the run
starts, trains or saves. What must hold: every logged number of every step, once; every weight and moment, bit for bit.
A step's loss is that of its own rows, so that no row was seen twice or left out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from sinkmodel.checkpoint import checkpoint_steps
from tests import tiny
from tests.processes import Program
from tests.recipes.runs import assert_same_run, numbers, start_process

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)


def kill_again_and_again(folder: Path, kills: int, seed: int, **settings: object) -> None:
    """Raises AssertionError if the run that was killed `kills` times is not the one that was not."""
    rng, data = random.Random(seed), folder / "data"
    tiny.prepared(data)
    steps = int(str(settings["schedule__steps"]))
    whole, run = folder / "whole", folder / "run"
    began = time.monotonic()
    finish(start_process(data, whole, **settings))
    say(f"undisturbed: {steps} steps in {time.monotonic() - began:.0f} s")
    for number in range(1, kills + 1):
        before = max(checkpoint_steps(run), default=0)
        process = start_process(data, run, **settings)
        how = strike(process, run, before, rng)
        _, stderr = process.communicate(timeout=120)
        after = max(checkpoint_steps(run), default=0)
        say(f"kill {number}: {how}; exit code {process.returncode}; step {before} to {after}")
        assert "Traceback" not in stderr, stderr
        assert process.returncode != 2, stderr
        assert after >= before
        assert after < steps, "the run ended before all the kills: give more --steps"
    finish(start_process(data, run, **settings))
    assert [int(row["step"]) for row in numbers(run) if row["loss"]] == list(range(1, steps + 1))
    assert_same_run(run, whole, steps)
    say(f"{kills} kills, seed {seed}, {settings}: the same {steps} lines, weights and moments, bit for bit")


def strike(process: Program, run: Path, before: int, rng: random.Random) -> str:
    """Wait a while, sometimes until a save is under way, and kill. Returns what was done."""
    if rng.random() < 0.15:
        time.sleep(rng.uniform(0, 4))  # while it starts
        when = "at the start"
    else:
        while process.poll() is None and max(checkpoint_steps(run), default=0) <= before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 1.5))
        when = "in training"
        if rng.random() < 0.3:
            until = time.monotonic() + 2
            while not list(run.rglob(".step*.part")) and time.monotonic() < until:
                time.sleep(0.0002)
            when = "in a save"
    ranks = children_of(process.pid) or [process.pid]
    number = rng.choice(SIGNALS)
    target = rng.choice(["the launcher", "one rank", "all ranks"])
    chosen = {"the launcher": [process.pid], "one rank": [rng.choice(ranks)], "all ranks": ranks}[target]
    twice = rng.random() < 0.3
    for _ in range(2 if twice else 1):
        for pid in chosen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(rng.uniform(0, 0.05))
    return f"{signal.Signals(number).name} to {target} {when}{', twice' if twice else ''}"


def children_of(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return sorted(int(word) for word in file.read().split())
    except FileNotFoundError:
        return []


def finish(process: Program) -> None:
    _, stderr = process.communicate(timeout=3600)
    assert process.returncode == 0, stderr


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--steps", type=int, default=4000)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        kill_again_and_again(
            Path(folder),
            options.kills,
            options.seed,
            schedule__steps=options.steps,
            checkpoints__every=20,
            logging__every=1,
            validation__every=options.steps,
            training__devices=options.processes,
            training__strategy=options.strategy,
            training__micro_rows=2,
            training__timeout=60,
        )


if __name__ == "__main__":
    main()
