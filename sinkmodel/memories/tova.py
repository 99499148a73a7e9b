"""TOVA (arXiv 2401.06104, section 3): evicts the tokens to which the latest query attends least.

The attention of the latest query is averaged over all heads of a layer, so all of them keep the same tokens. At the end
of the prompt, and after every `interval` tokens from then on, the lowest are evicted down to the budget.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sinkmodel.memories.arguments import whole
from sinkmodel.memories.layer import MemoryLayer
from sinkmodel.memories.memory import Memory
from sinkmodel.memories.observation import Observation


class TOVA(Memory):
    """A memory that keeps the tokens to which the latest query attends most.

    Args:
        window: number of the last tokens that are always kept. The paper (section 3) forces none. The default is 1, the
            token of the query itself, as in kvpress.
        interval: tokens between two evictions after the prompt; 1 in the paper (section 3). A query sees at most
            budget + interval keys.

    The other arguments are those of `Memory`.
    """

    def __init__(self, config: Any, budget: int | None = None, *, window: int = 1, interval: int = 1, **settings: Any):
        super().__init__(config, budget, window=window, **settings)
        self.interval = whole(interval, "interval", 1)

    @property
    def observes(self) -> bool:
        return not self.ended or (self.piece is not None and self.piece.evicts)

    def observe(self, layer: MemoryLayer, seen: Observation) -> None:
        layer.state["attention"] = seen.last(1).weights().mean(dim=(1, 2))  # [B, K]

    def scores(self, layer: MemoryLayer) -> Tensor:
        return layer.state.pop("attention")[:, None]  # the next eviction has another latest query
