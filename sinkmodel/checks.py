"""Checks of a setting's value, with a one-line message for each mistake: one of several choices, within bounds."""

from __future__ import annotations

import operator
from typing import Any, get_args

from sinkmodel.errors import UserError


def choices_of(literal: Any) -> tuple[str, ...]:
    """The values of a Literal, or of an optional one; None is not among them."""
    return tuple(
        value
        for part in get_args(literal)
        for value in (choices_of(part) if get_args(part) else (part,))
        if isinstance(value, str)
    )


def not_one_of(name: str, value: Any, choices: tuple[str, ...], null: bool = False) -> str:
    return f"{name} is {value!r}; choose one of {', '.join(choices)}{', or null' if null else ''}"


def one_of(name: str, value: Any, literal: Any) -> Any:
    """`value`, if it is one of the choices of a Literal, or None and the Literal is optional; else UserError."""
    null = type(None) in get_args(literal)
    if value not in choices_of(literal) and not (null and value is None):
        raise UserError(not_one_of(name, value, choices_of(literal), null))
    return value


def check_bounds(
    name: str,
    value: float | None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    unit: str = "",
) -> None:
    """Raise UserError unless a number is within its bounds; NaN is within none. None passes: the key is not given."""
    bounds = (
        (least, operator.ge, "at least"),
        (above, operator.gt, "above"),
        (most, operator.le, "at most"),
        (below, operator.lt, "below"),
    )
    given = [(limit, holds, words) for limit, holds, words in bounds if limit is not None]
    if value is not None and not all(holds(value, limit) for limit, holds, _ in given):
        wanted = " and ".join(f"{words} {_written(limit)}" for limit, _, words in given)
        raise UserError(f"{name} is {value}; it must be {wanted}{f' {unit}' if unit else ''}")


def _written(limit: float) -> str:
    """A large power of two as `2^63`."""
    power = isinstance(limit, int) and limit >= 1 << 20 and limit & (limit - 1) == 0
    return f"2^{int(limit).bit_length() - 1}" if power else f"{limit}"
