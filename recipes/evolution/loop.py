"""The loop over generations. It does not depend on what a candidate is or how its fitness is computed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from recipes.evolution.optimizer import Evolution
from recipes.training.processes import signals
from recipes.training.processes.ranks import from_all, from_first, is_one_of_several


def evolve(
    evolution: Evolution,
    fitness: Callable[[int, np.ndarray], np.ndarray],
    done: int,
    generations: int,
    after: Callable[[int, np.ndarray], None],
) -> tuple[int, int]:
    """Run the remaining generations. Every process of the run calls this.

    Args:
        evolution: the optimiser; used on rank 0 only, where it must have the fitnesses of the first `done` generations.
        fitness: takes the number of a generation, from 0, and its candidates [P, n]; returns their fitnesses [P].
            Higher is better.
        done: number of generations that are complete.
        generations: number of generations to reach.
        after: called on rank 0 after each generation, with the number of complete generations and the fitnesses [P].

    Returns the number of complete generations, and the signal that ended the loop early; 0 if none did.
    """
    signal = asked_to_stop()
    while done < generations and not signal:
        candidates = from_first(evolution.ask)
        values = fitness(done, candidates)
        done += 1

        def note(done: int = done, values: np.ndarray = values) -> None:
            evolution.tell(values.tolist())
            after(done, values)

        from_first(note)
        signal = asked_to_stop()
    return done, signal


def asked_to_stop() -> int:
    """The number of the signal that any process received; 0 if none did."""
    own = signals.received or 0
    return max(from_all(own)) if is_one_of_several() else own
