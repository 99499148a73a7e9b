"""SnapKV (arXiv 2404.14469, section 4): keeps the keys that the last queries of a prompt attend to.

For the last w queries of each query head, the attention to every earlier key is summed, smoothed over κ neighbours, and
combined over the heads of a group. The last w tokens themselves are kept as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sinkmodel.checks import one_of
from sinkmodel.errors import UserError
from sinkmodel.memories.arguments import odd
from sinkmodel.memories.layer import MemoryLayer
from sinkmodel.memories.memory import Memory
from sinkmodel.memories.observation import Observation
from sinkmodel.memories.selection import GroupRule, Pooling, join_group, pool


class SnapKV(Memory):
    """A memory that keeps the tokens to which the last `window` queries of the prompt attend.

    Args:
        window: w; 32 in the paper's experiments (section 5). A prompt that is not longer than the budget is kept whole.
        kernel: κ, an odd number of neighbours; 7 in the paper (section 5), 1 for no smoothing.
        pooling: "max" (the paper) or "avg" (the published code's default).
        group: how the heads of a group share one set: "mean" (kvpress), "max" or "sum". "as_published": each query head
            keeps its own set, which takes H/G times the memory.

    The other arguments are those of `Memory`. Formula: FasterDecoding/SnapKV, snapkv_utils.py.
    """

    SETTINGS = (*Memory.SETTINGS, "kernel", "pooling", "group")

    def __init__(
        self,
        config: Any,
        budget: int | None = None,
        *,
        window: int = 32,
        kernel: int = 7,
        pooling: Pooling = "max",
        group: GroupRule = "mean",
        **settings: Any,
    ):
        super().__init__(config, budget, window=window, **settings)
        if window < 1:
            raise UserError(f"SnapKV needs the last queries of a prompt; its window is {window}, make it at least 1")
        self.kernel, self.pooling, self.group = (
            odd(kernel),
            one_of("pooling", pooling, Pooling),
            one_of("group", group, GroupRule),
        )

    def observe(self, layer: MemoryLayer, seen: Observation) -> None:
        query = seen.query_BHND[:, :, -self.window :]
        before = layer.state.get("queries")
        layer.state["queries"] = (
            query.clone() if before is None else torch.cat([before, query], 2)[:, :, -self.window :]
        )

    def scores(self, layer: MemoryLayer) -> Tensor:
        weights_BHwK = self.of_last_queries(layer, layer.state["queries"]).weights()
        earlier = weights_BHwK.sum(dim=2)[..., : layer.length - self.window]
        scores = join_group(pool(earlier, self.kernel, self.pooling), layer.keys.shape[1], self.group)
        return torch.nn.functional.pad(scores, (0, layer.length - scores.shape[-1]))  # the window is always kept
