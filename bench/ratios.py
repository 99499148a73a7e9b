"""Ratios of what two sides took in the same rounds, as text that states what its parentheses are.

Both kinds compare within a round, so that whatever slows a whole round down cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median


def of_rounds(above: Sequence[float], below: Sequence[float], digits: int = 2) -> str:
    """`1.02 (rounds: 0.98 to 1.05)`: the median of above[i] / below[i], then the smallest and the largest."""
    ratios = sorted(a / b for a, b in zip(above, below))
    return f"{median(ratios):.{digits}f} (rounds: {ratios[0]:.{digits}f} to {ratios[-1]:.{digits}f})"


def interval(low: float, high: float) -> str:
    """`(95 %: 0.98 to 1.05)`: an interval by bootstrap over the rounds."""
    return f"(95 %: {low:.2f} to {high:.2f})"
