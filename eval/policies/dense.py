"""Dense attention: no key is ever evicted, and the cost per token grows with the stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from eval.policies.policy import CachedStream, Policy, refuse_narrower_window
from sinkmodel.scoring import check_decoder, dense_nll


class Dense(Policy):
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
