"""Policies with a cache: dense attention, which evicts nothing, and eviction by age, which keeps a window.

The window may come after sinks. It has our count of keys or the paper's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from eval.policies.policy import CachedStream, Policy, refuse_narrower_window
from sinkmodel.cache import StreamingCache
from sinkmodel.choices import Convention
from sinkmodel.scoring import check_decoder, dense_nll, streaming_nll


class Dense(Policy):
    """No key is ever evicted, and the cost per token grows with the stream."""

    name = "dense"
    sinks = 0
    budget = None
    needs = "nothing"
    keeps = "every key"
    positions = "text"

    def score(
        self, model: Any, documents: Sequence[Sequence[int]], chunk: int, on_chunk: Callable[[int], None]
    ) -> list[Tensor]:
        refuse_narrower_window(model, max(map(len, documents)) - 1)
        return dense_nll(model, documents, chunk, on_chunk)

    def stream(self, model: Any) -> CachedStream:
        check_decoder(model, cached=True)
        return CachedStream(model, DynamicCache())


@dataclass(frozen=True)
class Streaming(Policy):
    """`window` (S = 0) and `sink`. With `convention` "paper", eviction follows the forward: a query sees C + 1 keys."""

    name: str
    sinks: int
    budget: int
    convention: Convention = "inclusive"
    needs = "nothing"
    positions = "cache"

    @property
    def keeps(self) -> str:
        latest = f"the {self.window} latest"
        return f"the first {self.sinks} and {latest}" if self.sinks else latest

    @property
    def full(self) -> int:
        """How many keys a query sees once the cache is full."""
        return self.budget + (self.convention == "paper")

    def keys_seen(self, longest: int) -> int:
        return min(longest, self.full)

    def score(
        self, model: Any, documents: Sequence[Sequence[int]], chunk: int, on_chunk: Callable[[int], None]
    ) -> list[Tensor]:
        return streaming_nll(model, documents, self.full, self.sinks, chunk, on_chunk)

    def stream(self, model: Any) -> CachedStream:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "sinks=0")  # intended: this is the window policy
            cache = StreamingCache(model, budget=self.budget, sinks=self.sinks, convention=self.convention)
        return CachedStream(model, cache)
