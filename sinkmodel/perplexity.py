"""Perplexity, from a mean loss in nats per token."""

from __future__ import annotations

import math
from typing import overload

LARGEST = 700.0  # nats: math.exp of a little more (709.8) overflows, and JSON has no infinity


@overload
def perplexity(nll: float) -> float: ...
@overload
def perplexity(nll: float | None) -> float | None: ...
def perplexity(nll: float | None) -> float | None:
    """exp(nll), which is always finite: beyond LARGEST nats it stays at exp(LARGEST). None stays None."""
    return None if nll is None else math.exp(min(nll, LARGEST))
