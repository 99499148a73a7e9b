"""H2O (arXiv 2306.14048, section 4): keeps heavy hitters, the keys with the most attention so far, and recent keys.

The attention of every query is added to a sum for each key. At the end of the prompt, and after every `interval` tokens
from then on, the keys with the lowest sums are evicted. A token collects attention from the time when it was read, so
old tokens have an advantage; the method is defined so.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sinkmodel.checks import one_of
from sinkmodel.memories.arguments import whole
from sinkmodel.memories.layer import MemoryLayer
from sinkmodel.memories.memory import Memory
from sinkmodel.memories.observation import Observation
from sinkmodel.memories.selection import GroupRule


class H2O(Memory):
    """A memory that keeps the keys with the highest sums of attention, and the last `window` tokens.

    Args:
        window: number of the last tokens that are always kept. None is half of the budget, as in the paper's
            experiments (section 5).
        interval: tokens between two evictions after the prompt; 1 in the paper. A query sees at most
            budget + interval keys.
        group: how the sums of a group's query heads are combined: "sum", "mean" (makes the same choice) or "max". The
            default is ours, since the paper and its code have no grouped heads. "as_published": each query head keeps
            its own set, as in a model without groups, which takes H/G times the memory.

    Each slot has a sum and a position of 4 bytes each: with heads of size 64 in fp32, 1.6 % of its key and value. In
    half precision, the sum would lose the contribution of a single query. The other arguments are those of `Memory`.
    Formula: FMInference/H2O, utils_real_drop/modify_llama.py.
    """

    SETTINGS = (*Memory.SETTINGS, "half", "group")

    def __init__(
        self,
        config: Any,
        budget: int | None = None,
        *,
        window: int | None = None,
        interval: int = 1,
        group: GroupRule = "sum",
        **settings: Any,
    ):
        self.half = window is None
        super().__init__(config, budget, window=(budget or 0) // 2 if window is None else window, **settings)
        self.interval = whole(interval, "interval", 1)
        self.group = one_of("group", group, GroupRule)

    def windows(self) -> list[int]:
        return [budget // 2 for budget in self.budgets] if self.half else super().windows()

    def observe(self, layer: MemoryLayer, seen: Observation) -> None:
        sums_BHK = seen.column_sums()
        B, _, K = sums_BHK.shape
        G = layer.keys.shape[1]
        sums_BGRK = sums_BHK.view(B, G, -1, K)
        if self.group == "as_published":  # after the first eviction, the layer has a set for each query head
            layer.numbers("sums", *sums_BHK.shape[:2])[...] += sums_BHK
        elif self.group == "max":  # `scores` combines the heads' sums
            layer.numbers("sums", *sums_BGRK.shape[:3])[...] += sums_BGRK
        else:
            layer.numbers("sums", B, G)[...] += sums_BGRK.sum(dim=2)

    def scores(self, layer: MemoryLayer) -> Tensor:
        sums = layer.held_numbers("sums")
        return sums.amax(dim=2) if self.group == "max" else sums
