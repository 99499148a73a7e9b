"""What a list of per-token losses says: mean, its uncertainty, and how it runs along the text. Exact and pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def mean(parts: list[Tensor]) -> float | None:
    """The mean over all tokens of all documents, in fp64; None where there is none."""
    count = sum(len(part) for part in parts)
    return sum(part.double().sum().item() for part in parts) / count if count else None


def block_stderr(parts: list[Tensor], block: int) -> float | None:
    """The standard error of the mean, from means over consecutive blocks of `block` tokens.

    Neighbouring tokens are not independent, whole blocks nearly are. Blocks do not overlap and do not cross documents;
    what is left of a document behind its last whole block is not used. None where there are fewer than two blocks.
    """
    means = [b.mean().item() for part in parts for b in part.double().split(block) if len(b) == block]
    if len(means) < 2:
        return None
    center = sum(means) / len(means)
    return math.sqrt(sum((m - center) ** 2 for m in means) / (len(means) - 1) / len(means))


def by_position(parts: list[tuple[int, Tensor]], bins: int = 64) -> list[list[float]]:
    """Mean loss along the text as [first position, last position, mean], in at most `bins` bins of equal width.

    A part is (position of its first query, losses of consecutive queries); positions count from 0, sinks included.
    """
    end = max((first + len(losses) for first, losses in parts), default=0)
    width = max(1, -(-end // bins))
    rows = []
    for low in range(0, end, width):
        inside = [losses[max(0, low - first) : max(0, low + width - first)] for first, losses in parts]
        value = mean(inside)
        if value is not None:
            rows.append([low, min(low + width, end) - 1, value])
    return rows
