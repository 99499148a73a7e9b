"""The loop over generations. It knows neither what a candidate is nor how its fitness is found."""

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
    """Run the generations that are missing, on every process of the run alike.

    Args:
        fitness: of a generation, from 0, and its candidates [P, n]: a number [P] for each; higher is better.
        done: generations that are complete; `evolution` has been told their fitnesses on rank 0.
        generations: how many there shall be.
        after: called on rank 0, once `evolution` knows the fitnesses: of the generations that are complete, and these.

    Returns the generations that are complete, and the signal that ended the loop before its end; 0 if none did.
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
    """The signal that came to any process; 0 if none did."""
    own = signals.received or 0
    return max(from_all(own)) if is_one_of_several() else own
