"""Statistics of losses and times: means, quantiles, ratios, and their uncertainty. All functions are pure."""

from __future__ import annotations

import math
import random
from statistics import median

from torch import Tensor


def mean(parts: list[Tensor]) -> float | None:
    """The mean over all tokens of all documents, in fp64; None if there are no tokens."""
    count = sum(len(part) for part in parts)
    return sum(part.double().sum().item() for part in parts) / count if count else None


def block_stderr(parts: list[Tensor], block: int) -> float | None:
    """The standard error of the mean, from means over consecutive blocks of `block` tokens.

    Neighbouring tokens are not independent; whole blocks nearly are. Blocks do not overlap and do not cross documents.
    The tokens of a document after its last whole block are not used. Returns None if there are fewer than two blocks.
    """
    means = [b.mean().item() for part in parts for b in part.double().split(block) if len(b) == block]
    if len(means) < 2:
        return None
    center = sum(means) / len(means)
    return math.sqrt(sum((m - center) ** 2 for m in means) / (len(means) - 1) / len(means))


def by_position(parts: list[tuple[int, Tensor]], bins: int = 64) -> list[tuple[int, int, float | None]]:
    """Mean loss along the text as (first position, last position, mean), in at most `bins` bins of equal width.

    Each part is (position of its first query, losses of consecutive queries). Positions count from 0, sinks included.
    """
    end = max((first + len(losses) for first, losses in parts), default=0)
    width = max(1, -(-end // bins))
    rows: list[tuple[int, int, float | None]] = []
    for low in range(0, end, width):
        inside = [losses[max(0, low - first) : max(0, low + width - first)] for first, losses in parts]
        value = mean(inside)
        if value is not None:
            rows.append((low, min(low + width, end) - 1, value))
    return rows


def quantile(values: list[float], share: float) -> float:
    """The nearest-rank quantile: the smallest value such that a fraction `share` of all values does not exceed it.

    The p99 of fewer than 100 values is the largest.
    """
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def paired_ratio(
    above: list[float], below: list[float], resamples: int = 2000
) -> tuple[float, float | None, float | None]:
    """The median of above[i] / below[i] and its 95 % interval, by bootstrap over rounds.

    `above[i]` and `below[i]` are two times measured in one round, so that anything that slows the whole round down
    cancels in the ratio. With fewer than five rounds there is no interval: both of its ends are None.
    """
    ratios = [a / b for a, b in zip(above, below)]
    if len(ratios) < 5:
        return median(ratios), None, None
    rng = random.Random(0)
    medians = [median(rng.choices(ratios, k=len(ratios))) for _ in range(resamples)]
    return median(ratios), quantile(medians, 0.025), quantile(medians, 0.975)


def share(kept: float | None, of_dense: float | None) -> float | None:
    """The share of dense's keys and values that is kept; None if either count is unknown or dense keeps none."""
    return kept / of_dense if kept is not None and of_dense else None
