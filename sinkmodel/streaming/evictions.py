"""Report which token a streaming cache evicts for each new one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

OnEvict = Callable[[int, int, int], None]  # row, place in its stream (0 is the first token, a sink if any), token id


class Evictions:
    """The token ids in the window of each row. Calls `on_evict` for each evicted token, in order."""

    def __init__(self, on_evict: OnEvict, rows: int, sinks: int, window: int):
        self.on_evict, self.sinks, self.length = on_evict, sinks, window
        self.windows: list[deque[int]] = [deque() for _ in range(rows)]

    def note(self, chunk: Sequence[Sequence[int]], seen: Sequence[int]) -> None:
        """Record that the ids in `chunk`, one list per row, were fed. `seen` is each row's token count after them."""
        for i in range(max(map(len, chunk))):
            for row, ids in enumerate(chunk):
                place = seen[row] - len(ids) + i
                if i < len(ids) and place >= self.sinks:
                    self.windows[row].append(ids[i])
                    if len(self.windows[row]) > self.length:
                        self.on_evict(row, place - self.length, self.windows[row].popleft())
