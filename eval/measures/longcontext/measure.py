"""Measures a cell, which is one task at one length: all memories read the same contexts; and whether the cell counts.

Dense, which forgets nothing, is measured first. A cell counts only if dense can do the task. Either its score is at
least FLOOR_SCORE, or the context lowers the nats of the right answer by at least FLOOR_GAIN per token, compared to the
same prompt without its context. If neither holds, the cell is at the floor, and the other memories are not run, since
forgetting would not make a difference.

Numbers are means over contexts; the number of a context is the mean over its questions. Differences to dense are paired
by context, with a bootstrap interval over contexts (`eval.measures.verdict.equivalence`). A score and a share of exact
matches are between 0 and 1, and a few contexts may all agree by chance. So their intervals include two more contexts,
with differences of +1 and −1, as Bonett and Price (2012) adjust the interval of paired proportions. Without them the
interval would have no width if all contexts agree, and would cover too rarely if nearly all do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch

from eval.measures.longcontext.answers import Place, Reader
from eval.measures.statistics import block_stderr, share
from eval.measures.verdict.equivalence import interval
from sinkmodel.progress import CountedProgress
from sinkmodel.results.tasks import LongContextRow
from sinkmodel.tasks.cells import FLOOR_GAIN, FLOOR_SCORE, Cell

LEVEL = 0.95
NUMBERS = ("score", "exact", "nll", "rank")
BOUNDED = ("score", "exact")  # numbers between 0 and 1


@dataclass(frozen=True)
class Side:
    """A memory to measure; `budget` is None for dense, and for namm and its controls."""

    name: str
    budget: int | None
    memory: Any

    @property
    def label(self) -> str:
        return self.name if self.budget is None else f"{self.name} {self.budget}"


@dataclass(frozen=True)
class Measured:
    """The results of a memory in a cell: `score`, `exact`, `nll` and `rank` by context.

    `exact` is the share of exact matches; `rank` is None without distractors.
    """

    score: list[float]
    exact: list[float]
    nll: list[float]
    rank: list[float] | None
    bytes_held: float
    bytes_kept: float
    seconds: float


@dataclass(frozen=True)
class Ability:
    """Whether dense can do the task of a cell.

    Attributes:
        nll_alone: nats per token of the right answer without the context.
        gain: nats that the context saves.
        floor: whether dense cannot do the task, so that the other memories are not run.
    """

    nll_alone: float
    gain: float
    floor: bool


def measure_cell(
    reader: Reader, cell: Cell, dense: Side, others: Sequence[Side], place: Place, seed: int, label: str
) -> Iterator[LongContextRow]:
    """Yield the rows of a cell: dense, then each other memory."""
    alone = [fmean(reader.nll_alone(asked) for asked in reading.asked) for reading in cell.readings]
    of_dense = measure(reader, cell, dense.memory, place, f"{label}, dense")
    gain = fmean(alone) - fmean(of_dense.nll)
    ability = Ability(fmean(alone), gain, not counts(fmean(of_dense.score), gain))
    yield row_of(cell, dense, place, of_dense, None, ability, seed)
    for side in others:
        found = None if ability.floor else measure(reader, cell, side.memory, place, f"{label}, {side.label}")
        yield row_of(cell, side, place, found, of_dense, ability, seed)


def counts(score: float, gain: float) -> bool:
    """Whether dense can do a task, by its score or by the nats that the context saves per token of the answer."""
    return score >= FLOOR_SCORE or gain >= FLOOR_GAIN


def measure(reader: Reader, cell: Cell, memory: Any, place: Place, label: str) -> Measured:
    answers, sizes = [], []
    started = time.perf_counter()
    with CountedProgress(label, "contexts", len(cell.readings)) as progress:
        for reading in cell.readings:
            of_context, held, kept = reader.ask(memory, reading, place, cell.metric)
            answers.append(of_context)
            sizes.append((held, kept))
            progress.add(1)
    ranks = [[answer.rank for answer in of_context if answer.rank is not None] for of_context in answers]
    return Measured(
        [fmean(answer.score for answer in of_context) for of_context in answers],
        [fmean(float(answer.exact) for answer in of_context) for of_context in answers],
        [fmean(answer.nll for answer in of_context) for of_context in answers],
        list(map(fmean, ranks)) if all(ranks) else None,
        fmean(held for held, _ in sizes),
        fmean(kept for _, kept in sizes),
        time.perf_counter() - started,
    )


# ------------------------------------------------------------------------------------------------------------ numbers


def row_of(
    cell: Cell, side: Side, place: Place, found: Measured | None, dense: Measured | None, ability: Ability, seed: int
) -> LongContextRow:
    """A result row. `found` is None if the memory was not run; `dense` is None for dense's own row."""
    numbers: dict[str, float | None] = {}
    for name in NUMBERS:
        values, of_dense = getattr(found, name, None), getattr(dense, name, None)
        numbers[name] = None if values is None else fmean(values)
        numbers[f"{name}_stderr"] = None if values is None else block_stderr([torch.tensor(values)], 1)
        difference: tuple[float | None, float | None, float | None] = None, None, None
        if values is not None and of_dense is not None:
            difference = paired(values, of_dense, seed, bounded=name in BOUNDED)
        numbers |= dict(zip((f"{name}_difference", f"{name}_low", f"{name}_high"), difference))
    return LongContextRow(
        task=cell.task,
        length=cell.length,
        question=place,
        memory=side.name,
        budget=side.budget,
        label=side.label,
        metric=cell.metric.name,
        contexts=len(cell.readings),
        questions=sum(len(reading.asked) for reading in cell.readings),
        prompt_tokens=fmean(reading.tokens for reading in cell.readings),
        context_tokens=fmean(len(reading.context) for reading in cell.readings),
        **numbers,
        bytes_held=getattr(found, "bytes_held", None),
        bytes_kept=getattr(found, "bytes_kept", None),
        seconds=getattr(found, "seconds", None),
        kept_share=share(getattr(found, "bytes_kept", None), getattr(dense or found, "bytes_kept", None)),
        by_context={name: getattr(found, name, None) for name in NUMBERS},
        nll_alone=ability.nll_alone,
        gain=ability.gain,
        floor=ability.floor,
    )


def paired(
    values: Sequence[float], dense: Sequence[float], seed: int, bounded: bool
) -> tuple[float, float | None, float | None]:
    """The mean difference to dense and the ends of its interval for other contexts; None for fewer than five contexts.

    Args:
        bounded: whether the values are between 0 and 1, so that the interval is adjusted (see the module).
    """
    differences = [a - b for a, b in zip(values, dense)]
    adjusted = [*differences, 1.0, -1.0] if bounded else differences
    found = interval([np.array([x]) for x in adjusted], block=1, level=LEVEL, seed=seed)
    if found is None or interval([np.array([x]) for x in differences], block=1, resamples=1) is None:
        return fmean(differences), None, None
    low, high = (max(-1.0, found.low), min(1.0, found.high)) if bounded else (found.low, found.high)
    return fmean(differences), low, high
