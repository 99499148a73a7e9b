"""H2O (arXiv 2306.14048, section 4): heavy hitters, the keys that got most attention so far, beside the recent ones.

Every query that has been computed adds its attention to a sum for each key. At the end of the prompt, and after every
`interval` tokens from then on, the keys with the lowest sums go. A token has collected attention since it was read, so
old tokens have an advantage; that is the method's own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sinkmodel.memories.arguments import one_of, whole
from sinkmodel.memories.layer import MemoryLayer
from sinkmodel.memories.memory import Memory
from sinkmodel.memories.observation import Observation
from sinkmodel.memories.selection import JoiningRule


class H2O(Memory):
    """A memory that keeps the keys with the highest sums of attention, and the last `window` tokens.

    Args:
        window: None is half of the budget, as in the paper's experiments (section 5).
        interval: tokens between two evictions after the prompt; 1 is the paper's. A query sees at most
            budget + interval keys.
        group: how the sums of a group's query heads are joined: "sum", "mean" (the same choice) or "max".

    A slot has a sum beside its position, both of 4 bytes: with heads of size 64 in fp32, 1.6 % of its key and value. A
    sum in half precision would lose what a single query adds. The other arguments are those of `Memory`. Formula:
    FMInference/H2O, utils_real_drop/modify_llama.py.
    """

    SETTINGS = (*Memory.SETTINGS, "half", "group")

    def __init__(
        self,
        config: Any,
        budget: int | None = None,
        *,
        window: int | None = None,
        interval: int = 1,
        group: JoiningRule = "sum",
        **settings: Any,
    ):
        self.half = window is None
        super().__init__(config, budget, window=(budget or 0) // 2 if window is None else window, **settings)
        self.interval = whole(interval, "interval", 1)
        self.group = one_of("group", group, JoiningRule)

    def windows(self) -> list[int]:
        return [budget // 2 for budget in self.budgets] if self.half else super().windows()

    def observe(self, layer: MemoryLayer, seen: Observation) -> None:
        sums_BHK = seen.column_sums()
        B, _, K = sums_BHK.shape
        G = layer.keys.shape[1]
        sums_BGRK = sums_BHK.view(B, G, -1, K)
        if self.group == "max":  # the heads' sums are joined when they are read
            layer.numbers("sums", *sums_BGRK.shape[:3])[...] += sums_BGRK
        else:
            layer.numbers("sums", B, G)[...] += sums_BGRK.sum(dim=2)

    def scores(self, layer: MemoryLayer) -> Tensor:
        sums = layer.held_numbers("sums")
        return sums.amax(dim=2) if self.group == "max" else sums
