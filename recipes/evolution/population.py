"""Shares a population among processes: each evaluates some groups of candidates, and all get all results.

A group has the same candidates, and so the same tensor shapes, on any number of processes. So results are equal to the
bit on machines of the same kind with the same number of threads, and equal up to rounding on others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from recipes.training.processes.ranks import World, agree, from_all

Evaluate = Callable[[list[np.ndarray]], list[dict[str, np.ndarray]]]
"""Takes groups [r, n] of candidates, and returns for each group its numbers [r, …] by name."""


def shared(evaluate: Evaluate, candidates: np.ndarray, size: int, world: World) -> dict[str, np.ndarray]:
    """The numbers of all candidates [P, n], in their order, on every process; groups have `size` candidates."""
    groups = [candidates[start : start + size] for start in range(0, len(candidates), size)]
    mine = list(range(world.rank, len(groups), world.size))
    found = dict(zip(mine, agree(lambda: evaluate([groups[index] for index in mine]))))
    if world.size > 1:
        everywhere: list[Any] = from_all(found)
        found = {index: numbers for part in everywhere for index, numbers in part.items()}
    ordered = [found[index] for index in range(len(groups))]
    return {name: np.concatenate([numbers[name] for numbers in ordered]) for name in ordered[0]}
