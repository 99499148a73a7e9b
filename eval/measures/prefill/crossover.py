"""The time of whole answers, from the time to the first token and the cost per step; and when a side is overtaken.

An answer of n tokens takes the time to its first token and n − 1 steps. The cost s(i) of a step is measured at a few
places i of an answer. Between them it is interpolated linearly; after the last place it stays constant:

    T(n) = ttft + Σ s(i), i = 1 … n − 1

The side with the earlier first token stays ahead until its slower steps have used up its lead. The answer length at
which this happens is the crossover. If its steps are not slower, there is none. Pure functions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from eval.measures.statistics import quantile
from sinkmodel.results.latency import ENOUGH


@dataclass(frozen=True)
class Times:
    """Times of one side in ms, one entry per round: to the first token, and of a step at each place of an answer."""

    first: Sequence[float]
    steps: Mapping[int, Sequence[float]]

    def medians(self) -> tuple[float, dict[int, float]]:
        return median(self.first), {place: median(values) for place, values in self.steps.items()}

    def totals(self, answer: int) -> list[float]:
        """The time in ms of an answer of `answer` tokens, for each round."""
        by_round = [dict(zip(self.steps, values)) for values in zip(*self.steps.values())]
        return [total(first, steps, answer) for first, steps in zip(self.first, by_round)]


def total(first: float, steps: Mapping[int, float], answer: int) -> float:
    """T(n) in ms, the time of an answer of n tokens; `steps` maps places to ms per step."""
    return first + float(_at(steps, answer - 1).sum())


def crossover(first: tuple[float, Mapping[int, float]], second: tuple[float, Mapping[int, float]]) -> float:
    """The shortest answer, in tokens, that takes the first side longer than the second; infinity if there is none.

    Returns 0 if the first side has no lead: its first token does not come earlier.
    """
    lead = second[0] - first[0]
    if lead <= 0:
        return 0
    last = max(*first[1], *second[1])
    lost = np.cumsum(_at(first[1], last) - _at(second[1], last))  # after i steps, i = 1 … last
    over = np.flatnonzero(lost > lead)
    if len(over):
        return int(over[0]) + 2  # i steps make an answer of i + 1
    slower = first[1][max(first[1])] - second[1][max(second[1])]
    return last + 2 + math.floor((lead - lost[-1]) / slower) if slower > 0 else math.inf


def crossover_interval(first: Times, second: Times, resamples: int = 1000) -> tuple[float, float] | None:
    """The 95 % interval of the crossover of the medians, by bootstrap over rounds; None if there are too few rounds.

    Both sides of a round are drawn together. If the interval begins at 0, it is not certain which first token comes
    earlier. If it ends at infinity, the first side may never be overtaken.
    """
    if len(first.first) < ENOUGH:
        return None
    rng, found = random.Random(0), []
    for _ in range(resamples):
        drawn = {place: rng.choices(range(len(values)), k=len(values)) for place, values in first.steps.items()}
        of_first = rng.choices(range(len(first.first)), k=len(first.first))
        found.append(crossover(_drawn(first, of_first, drawn), _drawn(second, of_first, drawn)))
    return quantile(found, 0.025), quantile(found, 0.975)


def _drawn(times: Times, of_first: list[int], drawn: Mapping[int, list[int]]) -> tuple[float, dict[int, float]]:
    steps = {place: median(times.steps[place][i] for i in rounds) for place, rounds in drawn.items()}
    return median(times.first[i] for i in of_first), steps


def _at(steps: Mapping[int, float], count: int) -> np.ndarray:
    """The costs in ms of the steps 1 … count."""
    places = sorted(steps)
    return np.interp(np.arange(1, count + 1), places, [steps[place] for place in places])
