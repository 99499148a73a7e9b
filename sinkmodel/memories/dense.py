"""The memory that forgets nothing: what the others are compared with."""

from __future__ import annotations

from typing import Any

from sinkmodel.memories.memory import Memory

EVERYTHING = 2**62


class Dense(Memory):
    """Every key is kept. For comparisons: the same reading, the same interface, no eviction."""

    observes = False
    takes_budget = False

    def __init__(self, config: Any):
        super().__init__(config, EVERYTHING)
