"""Expected Attention (arXiv 2510.00636, section 3): the attention of future queries, if these are normally distributed.

The queries of the prompt, turned back to before RoPE, give a mean μ and a covariance Σ for each head. With the rotation
R̄ averaged over the next positions, the score of a key k is the expected attention E[exp(qᵀk · scale)], normalised:

    softmax_j( μ̄ᵀk_j · scale + ½ k_jᵀ Σ̄ k_j · scale² ) · ‖v_j‖,    μ̄ = R̄μ, Σ̄ = R̄ΣR̄ᵀ

averaged over the heads of a group. No attention matrix is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkmodel.checks import one_of
from sinkmodel.memories.arguments import whole
from sinkmodel.memories.layer import MemoryLayer
from sinkmodel.memories.memory import Memory
from sinkmodel.memories.observation import Observation
from sinkmodel.memories.selection import JoiningRule, join_group
from sinkmodel.rope import Rotation

BLOCK = 256  # queries that are rotated at once, few enough for the cache of a CPU


class ExpectedAttention(Memory):
    """A memory that keeps the tokens to which future queries are expected to attend.

    Args:
        sinks: number of leading tokens that are always kept and excluded from the statistics.
        future: number of positions after the prompt over which the rotation is averaged.
        covariance: whether to use Σ (section 3).
        value_norm: whether to multiply scores by the norm of the values (section 3).
        epsilon: added to a score before that.
        group: how the heads of a group are combined: "mean", "max" or "sum".

    The defaults are those of `ExpectedAttentionPress` in kvpress 0.5.5, the code that the paper was published with:
    4 sinks, 512 positions, Σ and norms in use, an epsilon of 0, the mean over a group. The paper may use others in its
    experiments. The other arguments are those of `Memory`. Formula: kvpress, presses/expected_attention_press.py.
    """

    SETTINGS = (*Memory.SETTINGS, "future", "covariance", "value_norm", "epsilon", "group")

    def __init__(
        self,
        config: Any,
        budget: int | None = None,
        *,
        sinks: int = 4,
        future: int = 512,
        covariance: bool = True,
        value_norm: bool = True,
        epsilon: float = 0.0,
        group: JoiningRule = "mean",
        **settings: Any,
    ):
        super().__init__(config, budget, sinks=sinks, **settings)
        self.future = whole(future, "future", 1)
        self.covariance, self.value_norm, self.epsilon = covariance, value_norm, epsilon
        self.group = one_of("group", group, JoiningRule)

    def _begin(self) -> None:
        super()._begin()
        self._of_piece: tuple[Any, Counted] | None = None

    def observe(self, layer: MemoryLayer, seen: Observation) -> None:
        rotary = self.rotary_of(layer)
        counted = self._counted(seen)
        query_BHND = seen.query_BHND[:, :, counted.first :]
        if rotary is not None and counted.rotation is None:
            counted.rotation = rotary.rotation(counted.back_B1N, query_BHND.device)
        rotation = counted.rotation
        for start in range(0, query_BHND.shape[2], BLOCK):
            block = slice(start, start + BLOCK)
            query = query_BHND[:, :, block].float()
            if rotary is not None and rotation is not None:
                query = rotary.apply(query, (rotation[0][:, :, block], rotation[1][:, :, block]))
            merge(layer.state, query, None if counted.weight_B1N1 is None else counted.weight_B1N1[:, :, block])

    def _counted(self, seen: Observation) -> Counted:
        """The queries of the piece that count. They are the same in every layer, so they are computed once."""
        if self._of_piece is None or self._of_piece[0] is not seen.places_BN:
            assert seen.places_BN is not None
            counts_BN = seen.places_BN >= self.sinks
            if seen.valid_BN is not None:
                counts_BN = counts_BN & seen.valid_BN
            some_N = counts_BN.any(dim=0)
            first = int(some_N.int().argmax()) if bool(some_N.any()) else len(some_N) - 1
            counts_BN = counts_BN[:, first:]
            weight = None if bool(counts_BN.all()) else counts_BN[:, None, :, None].float()
            self._of_piece = seen.places_BN, Counted(first, weight, -seen.places_BN[:, None, first:])
        return self._of_piece[1]

    def scores(self, layer: MemoryLayer) -> Tensor:
        keys, values = layer.held()
        G = keys.shape[1]
        mean_BHD, spread = layer.state["mean"], layer.state["spread"]
        count_B = layer.state["count"].clamp(min=1)
        covariance_BHDD = spread / count_B[:, None, None, None]
        rotary = self.rotary_of(layer)
        if rotary is not None:
            averaged = self._averaged_rotation(rotary, len(keys))
            mean_BHD = rotary.apply(mean_BHD, averaged)
            covariance_BHDD = rotary.apply(covariance_BHDD, _for_matrices(averaged))
            covariance_BHDD = rotary.apply(covariance_BHDD.transpose(-1, -2), _for_matrices(averaged))
        mean_BGRD, covariance_BGRDD = (x.unflatten(1, (G, -1)) for x in (mean_BHD, covariance_BHDD))
        keys = keys.float()
        logits_BGRK = (mean_BGRD @ keys.transpose(-1, -2)) * self.scale
        if self.covariance:
            for r, covariance_BGDD in enumerate(covariance_BGRDD.unbind(dim=2)):  # all at once would exceed the cache
                logits_BGRK[:, :, r] += (keys @ covariance_BGDD).mul_(keys).sum(-1) * (self.scale**2 / 2)
        positions = layer.held_positions()
        logits_BGRK = logits_BGRK.masked_fill((positions < self.sinks)[:, :, None], float("-inf"))
        weights = logits_BGRK.softmax(dim=-1).nan_to_num(0.0)  # a row with only sinks
        scores = join_group(weights.flatten(1, 2), G, self.group)
        return (scores + self.epsilon) * values.float().norm(dim=-1) if self.value_norm else scores

    def _averaged_rotation(self, rotary: Any, rows: int) -> Rotation:
        """Mean cos and sin [B, 1, R/2] over the `future` positions after each row."""
        device = self.layers[0].keys.device
        start_B1 = torch.tensor(self.piece.seen if self.piece else self.seen)[:, None]
        cos, sin = rotary.rotation(start_B1 + torch.arange(self.future), device)
        return cos.mean(dim=1)[:, None], sin.mean(dim=1)[:, None]


def _for_matrices(rotation: Rotation) -> Rotation:
    return rotation[0][:, None], rotation[1][:, None]


@dataclass
class Counted:
    """The queries of a piece that count in the statistics."""

    first: int  # no column before it counts
    weight_B1N1: Tensor | None  # 0 for later columns that do not count; None if all do
    back_B1N: Tensor  # the turn, in positions, that undoes the RoPE of each query
    rotation: Rotation | None = None


def merge(state: dict[str, Tensor], query_BHND: Tensor, weight_B1N1: Tensor | None) -> None:
    """Add queries to count [B], mean [B, H, D] and spread Σ(q − mean)(q − mean)ᵀ [B, H, D, D] (Chan et al. 1983)."""
    B, _, N, _ = query_BHND.shape
    if weight_B1N1 is None:
        count_B = torch.full((B,), float(N), device=query_BHND.device)
        mean = query_BHND.mean(dim=2)
        centred = query_BHND - mean[:, :, None]
    else:
        count_B = weight_B1N1.sum(dim=(1, 2, 3))
        mean = (query_BHND * weight_B1N1).sum(dim=2) / count_B.clamp(min=1)[:, None, None]
        centred = (query_BHND - mean[:, :, None]) * weight_B1N1
    spread = centred.transpose(-1, -2) @ centred
    if "count" in state:
        before, total = state["count"], (state["count"] + count_B).clamp(min=1)
        step = mean - state["mean"]
        spread = spread + state["spread"]
        spread = spread + (step[..., None] * step[..., None, :]) * (before * count_B / total)[:, None, None, None]
        mean, count_B = state["mean"] + step * (count_B / total)[:, None, None], before + count_B
    state["count"], state["mean"], state["spread"] = count_B, mean, spread
