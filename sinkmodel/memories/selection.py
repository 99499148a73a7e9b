"""Select the slots that a memory keeps from their scores: pure functions on tensors.

Shapes: B rows, H query heads in G groups of R = H/G, K slots, C of them kept.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkmodel.errors import UserError

JoiningRule = Literal["mean", "max", "sum"]
GroupRule = Literal["mean", "max", "sum", "as_published"]
Pooling = Literal["max", "avg"]

EMPTY = -1  # the position of a slot that holds no token


def budgets_by_ratio(seen: list[int], ratio: float, sinks: int, window: int) -> list[int]:
    """Slots of each row with `seen` tokens, of which the share `ratio` is evicted.

    Raises UserError if a row would keep fewer than its sinks and its window.
    """
    budgets = [max(1, int(n * (1 - ratio))) for n in seen]
    for row, (n, budget) in enumerate(zip(seen, budgets)):
        if budget < min(n, sinks + window):
            raise UserError(
                f"compression_ratio {ratio} keeps {budget} of the {n} tokens of row {row}, fewer than {sinks} sinks "
                f"and a window of {window}; choose a lower one"
            )
    return budgets


def pool(scores: Tensor, kernel: int, pooling: Pooling) -> Tensor:
    """Scores [B, X, K] smoothed over `kernel` neighbours, an odd number. "avg" counts zeros beyond the ends.

    This is `avg_pool1d(kernel, padding=kernel // 2, stride=1)` in SnapKV and GemFilter.
    """
    if kernel == 1 or not scores.shape[-1]:
        return scores
    smooth = F.max_pool1d if pooling == "max" else F.avg_pool1d
    return smooth(scores, kernel, stride=1, padding=kernel // 2)


def join_group(scores_BHK: Tensor, groups: int, rule: GroupRule) -> Tensor:
    """Scores of the KV heads [B, G, K] from those of the query heads. "as_published" keeps these: [B, H, K]."""
    if rule == "as_published":
        return scores_BHK
    grouped = scores_BHK.unflatten(1, (groups, -1))
    if rule == "max":
        return grouped.amax(dim=2)
    return grouped.sum(dim=2) if rule == "sum" else grouped.mean(dim=2)


def force(
    scores_BGK: Tensor, positions_BGK: Tensor, sinks: int, windows: list[int], seen: list[int], empty: bool = True
) -> Tensor:
    """Scores [B, G, K] in fp32, with +inf for slots that must stay and −inf for empty slots.

    Args:
        sinks: number of leading tokens that stay.
        windows: for each row, the number of its last tokens that stay.
        seen: for each row, the number of its tokens so far.
        empty: False if every slot is known to hold a token.
    """
    after = [n - window for n, window in zip(seen, windows)]
    if len(set(after)) == 1:  # no copy to the device
        stays = positions_BGK >= after[0]
    else:
        stays = positions_BGK >= torch.tensor(after, device=positions_BGK.device)[:, None, None]
    if sinks:
        stays = stays | (positions_BGK < sinks)
    scores = scores_BGK.float().expand(positions_BGK.shape).masked_fill(stays, float("inf"))
    return scores.masked_fill_(positions_BGK == EMPTY, float("-inf")) if empty else scores


def best(scores_BGK: Tensor, budgets: list[int]) -> tuple[Tensor, Tensor]:
    """The slots [B, G, C] with the highest scores, in ascending order, and whether each holds a token, [B, G, C].

    C is the largest budget. A row with a smaller budget or fewer tokens has empty slots at the front. Of equal scores
    the earlier slot is kept, so that the choice does not depend on the device.
    """
    keep = min(max(budgets), scores_BGK.shape[-1])
    order = scores_BGK.sort(dim=-1, descending=True, stable=True)
    slots, full = order.indices[..., :keep], order.values[..., :keep] > float("-inf")
    if min(budgets) < keep:
        rank = torch.arange(keep, device=scores_BGK.device)
        full = full & (rank < torch.tensor(budgets, device=scores_BGK.device)[:, None, None])
    # Ascending slots are ascending positions, since a prompt fills slots in the order of the text.
    ascending = torch.where(full, slots, slots - scores_BGK.shape[-1]).sort(dim=-1).indices
    return slots.gather(-1, ascending), full.gather(-1, ascending)


def kept(keep_BGK: Tensor) -> tuple[Tensor, Tensor]:
    """The slots [B, G, C] to keep, in ascending order, and whether each holds a token, [B, G, C].

    C is the largest number of slots that a head keeps. A head that keeps fewer has empty slots at the front.
    """
    ascending = keep_BGK.to(torch.uint8).sort(dim=-1, stable=True)
    most = int(keep_BGK.sum(dim=-1).max())
    start = keep_BGK.shape[-1] - most
    return ascending.indices[..., start:], ascending.values[..., start:].bool()
