"""Progress of long operations: a bar in a terminal, else a plain line every few seconds."""

from __future__ import annotations

import sys
import threading
import time

from tqdm import tqdm

from sinkmodel.console import say

EVERY = 10.0  # seconds between two lines


class Progress:
    """Tokens (or bytes) so far, the rate per second, and the time left if the fraction done is known.

    Args:
        task: the beginning of each line: the command, or its current activity.
        unit: plural name of what is counted, such as "tokens".
    """

    def __init__(self, task: str, unit: str):
        self.task, self.unit = task, unit
        self.began = self.printed = time.monotonic()
        self.first: tuple[float, float] | None = None  # share and count at the first update; above 0 after a resume
        self.bar: tqdm | None = None
        if sys.stderr.isatty():
            layout = "{desc}: {percentage:3.0f}%|{bar}| {postfix}"
            self.bar = tqdm(desc=task, total=1.0, bar_format=layout, file=sys.stderr, leave=False)

    def update(self, count: float, share: float | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = share or 0.0, count
        if self.bar is None and now - self.printed < EVERY:
            return
        line = progress_line(count, self.unit, share, now - self.began, *self.first)
        if self.bar is not None:
            self.bar.n = share or 0.0
            self.bar.set_postfix_str(line, refresh=now - self.printed > 0.1)
            if now - self.printed > 0.1:
                self.printed = now
        else:
            self.printed = now
            say(f"{self.task}: {line}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class CountedProgress:
    """Progress towards a known `total`, counted in steps. Several threads may add to it."""

    def __init__(self, task: str, unit: str, total: int):
        self.total, self.done = total, 0
        self._progress, self._lock = Progress(task, unit), threading.Lock()

    def __enter__(self) -> CountedProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.close()

    def add(self, step: int) -> None:
        with self._lock:
            self.done += step
            self._progress.update(self.done, self.done / self.total)


def progress_line(
    count: float, unit: str, share: float | None, seconds: float, first_share: float, first_count: float
) -> str:
    """`12.3M tokens, 1.20M tokens/s, 34%, 0:40 left`; speed and time left count from the start of this process."""
    speed = (count - first_count) / max(seconds, 1e-9)
    line = f"{_short(count)} {unit}, {_short(speed)} {unit}/s"
    if share is not None:
        line += f", {share:.0%}"
        if share > first_share:
            left = round(seconds * (1 - share) / (share - first_share))
            line += f", {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
    return line


def _short(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
