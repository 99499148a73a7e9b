"""Lets a training loop run in blocks of steps, so that loops in several processes can take turns on one core.

Only the standard library, since a peer's own environment does not have our packages.
"""

from __future__ import annotations

import json
import os
import sys
import time

MARK = "block done: "  # other lines of a process are what its library prints


class Gate:
    """A process calls `step` at the end of every optimiser step; after each block it waits for a line on stdin.

    The process is pinned to one core when the gate is made, before any thread is started. The first block is the
    warm-up. When stdin ends, the process ends at once, in the middle of its training.
    """

    def __init__(self, steps: int):
        pin()
        self.steps, self.done = steps, 0
        self._start()

    def step(self) -> None:
        self.done += 1
        if self.done < self.steps:
            return
        report(time.process_time() - self.cpu, time.perf_counter() - self.wall)
        if not sys.stdin.readline():
            os._exit(0)
        self.done = 0
        self._start()

    def _start(self) -> None:
        self.cpu, self.wall = time.process_time(), time.perf_counter()


def report(cpu: float, wall: float) -> None:
    """Print the seconds that were spent, for the process that takes turns."""
    print(f"{MARK}{json.dumps({'cpu': cpu, 'wall': wall})}", file=sys.__stdout__, flush=True)


def pin() -> None:
    """Pin this process to the last of the cores that it may use, if the system has such a call (Linux)."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
