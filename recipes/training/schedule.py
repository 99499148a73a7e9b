"""Learning rate as a pure function of the optimiser step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sinkmodel.checks import check_bounds, one_of

ScheduleKind = Literal["cosine", "wsd"]


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate over the steps. Defaults: Pythia's.

    Args:
        kind: `cosine` (Pythia's) or `wsd` (warm-up, stable, decay).
        steps: optimiser steps of the run; a run can be made longer if the rate does not jump (`wsd` before its decay).
        warmup: share of the steps, at the start, in which the rate rises from 0.
        min_lr: lowest rate after the warm-up; null takes 6e-5 for a new model, and a tenth of `optimizer.lr` for the
            model in `model.start_from`.
        decay: `wsd` only: share of the steps, at the end, in which the rate falls to min_lr.
    """

    kind: ScheduleKind = "cosine"
    steps: int = 143_000
    warmup: float = 0.01
    min_lr: float | None = None
    decay: float = 0.2

    def __post_init__(self) -> None:
        one_of("schedule.kind", self.kind, ScheduleKind)
        check_bounds("schedule.steps", self.steps, least=1)
        check_bounds("schedule.warmup", self.warmup, least=0, below=1, unit="(a share of the steps)")
        unit = "(a share of the steps, of which warmup takes the first)"
        check_bounds("schedule.decay", self.decay, least=0, most=1 - self.warmup, unit=unit)

    def lr(self, step: int, peak: float) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        assert self.min_lr is not None
        warmup = round(self.warmup * self.steps)
        if self.kind == "cosine":
            return cosine(step, peak, self.min_lr, warmup, self.steps)
        return warmup_stable_decay(step, peak, self.min_lr, warmup, round(self.decay * self.steps), self.steps)

    @property
    def decay_begins(self) -> int | None:
        """The step at which the decay begins; a run can be made longer from its checkpoint. None without a decay."""
        begins = self.steps - round(self.decay * self.steps)
        return begins if self.kind == "wsd" and round(self.warmup * self.steps) < begins < self.steps else None

    def continues(self, before: ScheduleSettings, step: int, peak: float) -> bool:
        """Whether a run can change from schedule `before` to this one at `step` without a jump of the rate."""
        return self == before or (0 < step <= self.steps and self.lr(step, peak) == before.lr(step, peak))


def cosine(step: int, peak: float, floor: float, warmup: int, steps: int) -> float:
    """Pythia's schedule, to the letter (EleutherAI/gpt-neox, megatron/learning_rates.py, AnnealingLR).

    The rate of step n is peak · n / warmup up to n = warmup, so that step 0 has rate 0. After that the rate follows
    half a cosine whose length is all `steps`, warm-up included. It never falls below `floor`, and is constant over the
    last `warmup` steps.
    """
    if warmup > 0 and step <= warmup:
        return peak * step / warmup
    done = min(step, steps - warmup) - warmup
    return max(floor, peak / 2 * (math.cos(math.pi * done / steps) + 1))


def warmup_stable_decay(step: int, peak: float, floor: float, warmup: int, decay: int, steps: int) -> float:
    """Linear to `peak` at step `warmup`, constant, then linear to `floor` over the last `decay` steps."""
    if step < warmup:
        return peak * step / warmup
    left = steps - step
    if left >= decay:
        return peak
    return floor + (peak - floor) * max(0, left) / decay
