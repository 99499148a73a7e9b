"""Checks of a memory's arguments, with a one-line message for each mistake."""

from __future__ import annotations

import operator
from typing import Any

from sinkmodel.errors import UserError


def whole(value: Any, name: str, least: int) -> int:
    """`value` as an int. Raises UserError if it is not one, or below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} is {value!r}; give a whole number") from None
    if number < least:
        raise UserError(f"{name} is {number}; make it at least {least}")
    return number


def odd(kernel: Any) -> int:
    """A pooling kernel, which must be odd, since an even one would shift the scores by half a token."""
    number = whole(kernel, "kernel", 1)
    if number % 2 == 0:
        raise UserError(f"kernel is {number}; make it an odd number")
    return number


def check_room(name: str, budget: Any, compression_ratio: float | None, sinks: int, window: int) -> int | None:
    """The budget of a memory as an int. Raises UserError unless it has a budget or a ratio, and room for both ends."""
    if (budget is None) == (compression_ratio is None):
        raise UserError(f"give {name} a budget or a compression_ratio, one of the two")
    if compression_ratio is not None and not 0 <= compression_ratio < 1:
        raise UserError(f"compression_ratio is {compression_ratio}; it is at least 0 and below 1")
    if budget is None:
        return None
    budget = whole(budget, "budget", 1)
    if budget < sinks + window:
        raise UserError(
            f"a budget of {budget} does not hold {sinks} sinks and a window of {window}; make it at least "
            f"{sinks + window}"
        )
    return budget
