"""Guards: the learning rate of each step, on exact values."""

from __future__ import annotations

import math

import pytest

from recipes.training.schedule import ScheduleSettings, cosine, warmup_stable_decay
from sinkmodel.errors import UserError

PYTHIA = ScheduleSettings(min_lr=6e-5)


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 0.0),
        (1, 6e-4 / 1430),
        (715, 3e-4),
        (1430, 6e-4),
        (1430 + 35750, 3e-4 * (math.cos(math.pi / 4) + 1)),
        (1430 + 71500, 3e-4),
        (142_999, 6e-5),
    ],
)
def test_pythia_160m(step, lr):
    assert PYTHIA.lr(step, 6e-4) == pytest.approx(lr, rel=1e-12)


def test_cosine_against_gpt_neox_line_by_line():
    """AnnealingLR.get_lr of megatron/learning_rates.py, written out."""

    def neox(n, start, floor, warmup, end):
        m = min(n, end - warmup)
        if warmup > 0 and n <= warmup:
            return start * m / warmup
        m -= warmup
        return max(start / 2.0 * (math.cos(math.pi * m / end) + 1), floor)

    for n in range(100):
        assert cosine(n, 1e-3, 1e-4, 10, 100) == pytest.approx(neox(n, 1e-3, 1e-4, 10, 100), rel=1e-12)


def test_warmup_stable_decay():
    rates = [warmup_stable_decay(n, 1.0, 0.1, warmup=4, decay=5, steps=20) for n in range(21)]
    assert rates[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert rates[5:16] == [1.0] * 11
    assert rates[16:] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])


def wsd(steps: int, **more) -> ScheduleSettings:
    return ScheduleSettings(kind="wsd", **{"steps": steps, "warmup": 0.1, "decay": 0.2, "min_lr": 0.1, **more})


@pytest.mark.parametrize(
    ("before", "after", "step", "continues"),
    [
        (wsd(100), wsd(200), 80, True),  # the decay begins there
        (wsd(100), wsd(200), 81, False),
        (wsd(100), wsd(200), 19, False),  # still in the longer warm-up
        (wsd(100), wsd(200), 20, True),
        (wsd(100, decay=0), wsd(150), 100, True),
        (wsd(100), wsd(90), 72, True),
        (wsd(100), wsd(90), 73, False),
        (wsd(100), wsd(60), 80, False),
        (wsd(100), wsd(100), 95, True),  # nothing has changed
        (wsd(100, warmup=0), wsd(200, warmup=0), 0, False),  # that would be to begin again
        (ScheduleSettings(steps=100, min_lr=0), ScheduleSettings(steps=200, min_lr=0), 50, False),
        (ScheduleSettings(steps=100, min_lr=0), ScheduleSettings(steps=100, min_lr=0), 50, True),
    ],
)
def test_a_schedule_continues_another_where_the_rate_does_not_jump(before, after, step, continues):
    assert after.continues(before, step, 1.0) is continues


def test_where_a_decay_begins():
    assert wsd(100).decay_begins == 80
    assert wsd(100).lr(80, 1.0) == 1.0 > wsd(100).lr(81, 1.0)
    assert wsd(100, decay=0).decay_begins is None
    assert wsd(100, decay=0.9).decay_begins is None, "no constant rate that could continue"
    assert PYTHIA.decay_begins is None


def test_settings_that_make_no_schedule_are_refused():
    for wrong in ({"kind": "linear"}, {"steps": 0}, {"warmup": 1.0}, {"warmup": 0.5, "decay": 0.6}):
        with pytest.raises(UserError, match=r"schedule\."):
            ScheduleSettings(**wrong)
