"""Guards: a wrong value of a setting is one line that names the key, the value and what it may be."""

from __future__ import annotations

import math
from typing import Literal

import pytest

from sinkmodel.checks import check_bounds, choices_of, one_of
from sinkmodel.errors import UserError

Colour = Literal["red", "green"]


def test_choices_come_from_the_type():
    assert choices_of(Colour) == choices_of(Colour | None) == ("red", "green")
    assert one_of("x", "red", Colour) == "red"
    assert one_of("x", None, Colour | None) is None
    for literal, value, end in ((Colour, None, ""), (Colour | None, "blue", ", or null")):
        with pytest.raises(UserError) as error:
            one_of("a.x", value, literal)
        assert str(error.value) == f"a.x is {value!r}; choose one of red, green{end}"


@pytest.mark.parametrize(
    ("value", "bounds", "wanted"),
    [
        (0, {"least": 1}, "at least 1"),
        (math.nan, {"least": 0}, "at least 0"),
        (0.0, {"above": 0, "unit": "seconds"}, "above 0 seconds"),
        (1.0, {"least": 0, "below": 1}, "at least 0 and below 1"),
        (17, {"least": 1, "most": 16}, "at least 1 and at most 16"),
        (1 << 63, {"least": 0, "below": 1 << 63}, "at least 0 and below 2^63"),
        (math.inf, {"above": 0, "below": math.inf}, "above 0 and below inf"),
    ],
)
def test_a_number_out_of_bounds_is_named_with_its_bounds(value, bounds, wanted):
    with pytest.raises(UserError) as error:
        check_bounds("a.x", value, **bounds)
    assert str(error.value) == f"a.x is {value}; it must be {wanted}"
    check_bounds("a.x", None, **bounds)
    check_bounds("a.x", 1, least=1, most=1)
