"""Checks of what a memory is made with: one clear line for each mistake."""

from __future__ import annotations

import operator
from typing import Any, get_args

from sinkmodel.errors import UserError


def whole(value: Any, name: str, least: int) -> int:
    """`value` as an int that is at least `least`; UserError if it is not."""
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} is {value!r}; give a whole number") from None
    if number < least:
        raise UserError(f"{name} is {number}; make it at least {least}")
    return number


def odd(kernel: Any) -> int:
    """A pooling kernel: an odd number, since an even one would move the scores by half a token."""
    number = whole(kernel, "kernel", 1)
    if number % 2 == 0:
        raise UserError(f"kernel is {number}; make it an odd number")
    return number


def one_of(name: str, value: Any, choices: Any) -> Any:
    """`value`, if it is one of a Literal's."""
    if value not in get_args(choices):
        raise UserError(f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}")
    return value
