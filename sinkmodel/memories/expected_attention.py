"""Expected Attention (arXiv 2510.00636, section 3): the attention that future queries will pay, were they normal.

The queries of the prompt, taken back to before RoPE, give a mean μ and a covariance Σ a head. With the rotation R̄
averaged over the next positions, the score of a key k is the expected attention E[exp(qᵀk · scale)], normalised:

    softmax_j( μ̄ᵀk_j · scale + ½ k_jᵀ Σ̄ k_j · scale² ) · ‖v_j‖,    μ̄ = R̄μ, Σ̄ = R̄ΣR̄ᵀ

averaged over the heads of a group. No attention matrix is needed at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sinkmodel.memories.arguments import one_of, whole
from sinkmodel.memories.layer import MemoryLayer
from sinkmodel.memories.memory import Memory
from sinkmodel.memories.observation import Observation
from sinkmodel.memories.selection import JoiningRule, join_group
from sinkmodel.rope import Rotation


class ExpectedAttention(Memory):
    """A memory that keeps what future queries are expected to attend to.

    Args:
        sinks: the first tokens stay, and their queries and keys take no part in the statistics; 4 in kvpress.
        future: positions after the prompt over which the rotation is averaged; 512 in kvpress.
        covariance: whether Σ takes part.
        value_norm: whether scores are multiplied by the norm of the values.
        epsilon: what is added to a score before that; 0 in kvpress.
        group: how the heads of a group are joined; "mean" in kvpress.

    The others are those of `Memory`. Formula: kvpress, presses/expected_attention_press.py.
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

    def observe(self, layer: MemoryLayer, seen: Observation) -> None:
        assert seen.places_BN is not None
        rotary = self.rotary_of(layer)
        query = seen.query_BHND.float()
        if rotary is not None:
            query = rotary.turn(query, -seen.places_BN[:, None])
        counted_BN = seen.places_BN >= self.sinks
        if seen.valid_BN is not None:
            counted_BN = counted_BN & seen.valid_BN
        merge(layer.state, query, counted_BN)

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
            turned = torch.stack([keys @ covariance_BGRDD[:, :, r] for r in range(covariance_BGRDD.shape[2])], dim=2)
            logits_BGRK += (turned * keys[:, :, None]).sum(-1) * (self.scale**2 / 2)
        positions = layer.held_positions()
        logits_BGRK = logits_BGRK.masked_fill((positions < self.sinks)[:, :, None], float("-inf"))
        weights = logits_BGRK.softmax(dim=-1).nan_to_num(0.0)  # a row that has nothing but sinks
        scores = join_group(weights.flatten(1, 2), G, self.group)
        return (scores + self.epsilon) * values.float().norm(dim=-1) if self.value_norm else scores

    def _averaged_rotation(self, rotary: Any, rows: int) -> Rotation:
        """Mean cos and sin [B, 1, R/2] of the `future` positions after each row."""
        device = self.layers[0].keys.device
        start_B1 = torch.tensor(self.piece.seen if self.piece else self.seen)[:, None]
        cos, sin = rotary.rotation(start_B1 + torch.arange(self.future), device)
        return cos.mean(dim=1)[:, None], sin.mean(dim=1)[:, None]


def _for_matrices(rotation: Rotation) -> Rotation:
    return rotation[0][:, None], rotation[1][:, None]


def merge(state: dict[str, Tensor], query_BHND: Tensor, counted_BN: Tensor) -> None:
    """Add queries to count [B], mean [B, H, D] and spread Σ(q − mean)(q − mean)ᵀ [B, H, D, D] (Chan et al. 1983)."""
    weight = counted_BN[:, None, :, None].to(query_BHND.dtype)
    count_B = counted_BN.sum(dim=1).to(query_BHND.dtype)
    some = count_B.clamp(min=1)[:, None, None]
    mean = (query_BHND * weight).sum(dim=2) / some
    centred = (query_BHND - mean[:, :, None]) * weight
    spread = centred.transpose(-1, -2) @ centred
    if "count" in state:
        before, total = state["count"], (state["count"] + count_B).clamp(min=1)
        step = mean - state["mean"]
        share = (count_B / total)[:, None, None]
        spread = spread + state["spread"]
        spread = spread + (step[..., None] * step[..., None, :]) * (before * count_B / total)[:, None, None, None]
        mean, count_B = state["mean"] + step * share, before + count_B
    state["count"], state["mean"], state["spread"] = count_B, mean, spread
