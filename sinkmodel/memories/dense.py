"""A memory that evicts nothing, as the baseline for the others."""

from __future__ import annotations

from typing import Any

from sinkmodel.memories.memory import Memory

EVERYTHING = 2**62


class Dense(Memory):
    """Keeps every key. For comparisons: it reads in the same way through the same interface, without eviction."""

    observes = False
    takes_budget = False

    def __init__(self, config: Any):
        super().__init__(config, EVERYTHING)
