"""Which token leaves a streaming cache for each that comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

OnEvict = Callable[[int, int, int], None]  # row, place in its stream (0 is the first token, a sink if any), token id


class Evictions:
    """The ids in the window of each row; `told` hears of those that go, in the order in which they go."""

    def __init__(self, told: OnEvict, rows: int, sinks: int, window: int):
        self.told, self.sinks, self.length = told, sinks, window
        self.windows: list[deque[int]] = [deque() for _ in range(rows)]

    def note(self, chunk: Sequence[Sequence[int]], seen: Sequence[int]) -> None:
        """The ids of `chunk` have come, one list a row; with them each row has `seen` tokens."""
        for i in range(max(map(len, chunk))):
            for row, ids in enumerate(chunk):
                place = seen[row] - len(ids) + i
                if i < len(ids) and place >= self.sinks:
                    self.windows[row].append(ids[i])
                    if len(self.windows[row]) > self.length:
                        self.told(row, place - self.length, self.windows[row].popleft())
