"""The optimiser: CMA-ES of the package `cmaes`, which a resumed run replays from saved fitnesses.

The candidates of a generation depend only on the seed and on the fitnesses of the generations before it. So only the
fitnesses have to be saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import cmaes
import numpy as np

from recipes.evolution.settings import CmaSettings


class Evolution:
    """A population of P candidates with n parameters each; the first mean is zero.

    Args:
        parameters: n, the number of parameters of a candidate.
        population: P, the number of candidates of a generation.
        seed: random seed of the candidates.
    """

    def __init__(self, parameters: int, population: int, settings: CmaSettings, seed: int):
        kind = cmaes.SepCMA if settings.kind == "separable" else cmaes.CMA
        self._cma: Any = kind(np.zeros(parameters), settings.sigma, seed=seed, population_size=population)
        self._asked: list[np.ndarray] = []

    @property
    def generation(self) -> int:
        """Number of complete generations."""
        return self._cma.generation

    @property
    def mean(self) -> np.ndarray:
        """The mean [n] of the population, which is the result; a copy."""
        return self._cma.mean.copy()

    @property
    def sigma(self) -> float:
        """The step size."""
        return float(self._cma._sigma)

    @property
    def digest(self) -> str:
        """SHA-256 of the mean, to check whether a replay gives the same bits."""
        return hashlib.sha256(self.mean.tobytes()).hexdigest()

    def ask(self) -> np.ndarray:
        """The candidates [P, n] of the next generation."""
        self._asked = [self._cma.ask() for _ in range(self._cma.population_size)]
        return np.stack(self._asked)

    def tell(self, fitness: Sequence[float]) -> None:
        """Complete the generation with the fitness of each candidate from `ask`; higher is better."""
        assert len(fitness) == len(self._asked)
        assert np.isfinite(fitness).all()
        self._cma.tell([(candidate, -value) for candidate, value in zip(self._asked, fitness)])
        self._asked = []

    def replay(self, generations: Sequence[Sequence[float]]) -> None:
        """Restore the state after these generations, bit for bit, from their fitnesses."""
        for fitness in generations:
            self.ask()
            self.tell(fitness)
