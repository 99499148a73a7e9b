"""Sides that take turns on one core: their CPU and wall time, ratios with an interval, and the peak of the products.

A ratio compares two blocks of the same round, so what else the machine does affects both. By CPU time it matters
little; by wall time it widens the interval.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from bench.peers.gate import MARK
from bench.ratios import interval
from eval.measures.statistics import paired_ratio
from sinkmodel.products import fast_products, library, matmul

ROOT = Path(__file__).resolve().parents[2]
SIZE = 1024  # of the square matrices whose product is the peak


@dataclass(frozen=True)
class Spent:
    """Seconds of one block: CPU time of the process, and wall time."""

    cpu: float
    wall: float


Block = Callable[[], Spent]


def timed(work: Callable[[], object]) -> Spent:
    """Run `work` in this process."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Spent(time.process_time() - cpu, time.perf_counter() - wall)


def take_turns(sides: Mapping[str, Block], rounds: int) -> dict[str, list[Spent]]:
    """The blocks of each side. The order of the sides is reversed in every second round."""
    spent: dict[str, list[Spent]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            spent[name].append(sides[name]())
    return spent


def compared(ours: Sequence[Spent], theirs: Sequence[Spent]) -> str:
    """`1.42 × as fast by CPU time (95 %: 1.40 to 1.45), 1.40 × by wall time (95 %: 1.31 to 1.52)`, of `ours`."""
    texts = []
    for clock, name in (("cpu", "CPU time"), ("wall", "wall time")):
        above, below = ([getattr(block, clock) for block in side] for side in (theirs, ours))
        ratio, low, high = paired_ratio(above, below)
        within = f" {interval(low, high)}" if low is not None and high is not None else ""
        texts.append(f"{ratio:.2f} × {'' if texts else 'as fast '}by {name}{within}")
    return ", ".join(texts)


def cpu_seconds(blocks: Sequence[Spent]) -> float:
    return median(block.cpu for block in blocks)


def peak_product(tries: int = 8) -> tuple[float, str]:
    """FLOP/s of the fastest of some products of large fp32 matrices, by CPU time of one thread; the chosen library.

    The library is the one that training uses on this machine: see `sinkmodel.products`.
    """
    a_NN, b_NN = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    chosen = library()
    with torch.no_grad(), fast_products(chosen):
        best = min(timed(lambda: matmul(a_NN, b_NN)).cpu for _ in range(tries))
    return 2 * SIZE**3 / best, chosen


# ----------------------------------------------------------------------------------------- a side in its own process


def run(command: Sequence[str]) -> Spent:
    """Run a process to its end: its CPU time and that of its children."""
    before, wall = children_seconds(), time.perf_counter()
    _output_of(command)
    return Spent(children_seconds() - before, time.perf_counter() - wall)


def run_and_read(command: Sequence[str]) -> Spent:
    """Run a process to its end: the part of its time that it reports (`bench.peers.gate.report`)."""
    (line,) = [line for line in _output_of(command).splitlines() if line.startswith(MARK)]
    return Spent(**json.loads(line.removeprefix(MARK)))


def _output_of(command: Sequence[str]) -> str:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    nothing = subprocess.DEVNULL  # a side with a `Gate` ends after its first block
    done = subprocess.run(command, stdin=nothing, capture_output=True, encoding="utf-8", cwd=ROOT, env=env)
    if done.returncode:
        raise RuntimeError(f"{command[:3]} ended with code {done.returncode}:\n{done.stderr}")
    return done.stdout


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Worker:
    """A process with a `Gate`. Calling it runs one block."""

    def __init__(self, command: Sequence[str | Path], log: Path, env: Mapping[str, str]):
        self.name, self.log = str(command[-1]), log
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            encoding="utf-8",
        )
        self._wait()  # for the warm-up

    def __call__(self) -> Spent:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._wait()

    def _wait(self) -> Spent:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return Spent(**json.loads(line.removeprefix(MARK)))
        self.process.wait()
        error = self.log.read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"{self.name} ended with code {self.process.returncode}:\n{error}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def workers(commands: Mapping[str, Sequence[str | Path]], **env: str) -> Iterator[dict[str, Worker]]:
    """Start a worker for each side, one after the other; all of them end with the block."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as started:
        sides = {}
        for number, (name, command) in enumerate(commands.items()):
            sides[name] = Worker(command, Path(folder) / f"{number}.log", env)
            started.callback(sides[name].close)
        yield sides
