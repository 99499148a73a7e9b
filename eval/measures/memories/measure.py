"""All memories on the same prompts: losses, paired differences to dense, bytes, and times side by side.

The prompts are read one after the other. For each prompt all sides take turns, so that a busy machine slows all of them
equally; times are compared prompt by prompt. The series of a document is the losses of its continuations, one after the
other. Each continuation is a block of the bootstrap (`eval.measures.verdict.equivalence`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eval.measures.memories.readers import Reader, Reading
from eval.measures.statistics import block_stderr, share
from eval.measures.verdict.equivalence import answer_to, interval, is_sample, no_sample
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.perplexity import perplexity
from sinkmodel.progress import CountedProgress
from sinkmodel.results.memories import MemoryRow

UNKNOWN = dict.fromkeys(("difference", "low", "high", "stderr_difference", "answer", "speaks_of"))


@dataclass(frozen=True)
class Side:
    """A memory at a budget: a row of the table."""

    memory: str
    budget: int | None  # None for dense, and for namm and its controls
    reads: Reader
    remark: str  # describes the tokens that it keeps

    @property
    def label(self) -> str:
        return self.memory if self.budget is None else f"{self.memory} {self.budget}"


@dataclass(frozen=True)
class Question:
    """What all rows share."""

    prompt: int  # tokens of a prompt, without the model's sinks
    after: int  # tokens after the prompt that are scored
    margin: float
    level: float
    seed: int
    these_texts: bool


def places(documents: Sequence[Sequence[int]], front: int, question: Question, most: int) -> list[list[int]]:
    """For each document the indices at which its prompts begin: at most `most`, evenly spread, without overlap."""
    length = question.prompt + question.after
    found = []
    for ids in documents:
        room = len(ids) - front
        count = min(most, room // length)
        free = room - count * length
        found.append([front + i * length + (free * i // (count - 1) if count > 1 else 0) for i in range(count)])
    return found


def measure(
    model: Any, sides: Sequence[Side], documents: Sequence[Sequence[int]], front: int, question: Question, most: int
) -> list[MemoryRow]:
    """Read all prompts with all sides; returns one row per side.

    Args:
        sides: the first must be dense, which the others are compared to.
        documents: token ids, the model's sink tokens included.
        front: number of the model's sink tokens at the beginning of each document.
        most: prompts per document.
    """
    starts = places(documents, front, question, most)
    lengths = [len(each) * question.after for each in starts]
    if not question.these_texts and not is_sample(lengths):
        say(f"warning: {no_sample(lengths)}; the answer will be undecided")
    total = sum(map(len, starts))
    readings: list[list[list[Reading]]] = [[[] for _ in documents] for _ in sides]  # side, document, prompt
    with CountedProgress("prompts × memories", "readings", total * len(sides)) as progress:
        for d, (ids, of_document) in enumerate(zip(documents, starts)):
            for start in of_document:
                middle = start + question.prompt
                prompt = [*ids[:front], *ids[start:middle]]
                for s, side in enumerate(sides):
                    readings[s][d].append(read(model, side, prompt, list(ids[middle : middle + question.after])))
                    progress.add(1)
    return [row(side, readings[s], readings[0], question) for s, side in enumerate(sides)]


def read(model: Any, side: Side, prompt: list[int], after: list[int]) -> Reading:
    try:
        found = side.reads(model, prompt, after)
    except UserError as error:
        raise UserError(f"{side.label}: {error}") from None
    if not bool(torch.isfinite(found.nll).all()):
        raise UserError(f"{side.label} gave losses that are not finite; try --dtype float32")
    return found


def row(
    side: Side, readings: Sequence[Sequence[Reading]], dense: Sequence[Sequence[Reading]], question: Question
) -> MemoryRow:
    scored = [torch.cat([reading.nll for reading in each]) for each in readings]
    flat = [reading for each in readings for reading in each]
    of_dense = [reading for each in dense for reading in each]
    nll = float(torch.cat(scored).double().mean())
    return MemoryRow(
        memory=side.memory,
        budget=side.budget,
        label=side.label,
        keeps=side.remark,
        prompts=len(flat),
        documents=len(readings),
        tokens=sum(map(len, scored)),
        nll=nll,
        ppl=perplexity(nll),
        stderr=block_stderr(scored, question.after),
        **(UNKNOWN if readings is dense else against(scored, dense, question)),
        bytes_held=average([reading.bytes_held for reading in flat]),
        bytes_kept=average([reading.bytes_kept for reading in flat]),
        keys_kept=average([reading.keys_kept for reading in flat]),
        kept_share=share(
            average([reading.bytes_kept for reading in flat]), average([reading.bytes_kept for reading in of_dense])
        ),
        prefill_seconds=median([reading.prefill_seconds for reading in flat]),
        decode_ms=median([reading.decode_seconds and 1e3 * reading.decode_seconds for reading in flat]),
        prefill_ratio=ratio(flat, of_dense, "prefill_seconds"),
        decode_ratio=ratio(flat, of_dense, "decode_seconds"),
    )


def against(scored: Sequence[torch.Tensor], dense: Sequence[Sequence[Reading]], question: Question) -> dict[str, Any]:
    """The paired difference to dense in nats per token, its interval and answer (None if there is too little text)."""
    differences = [
        mine.double().numpy() - torch.cat([reading.nll for reading in theirs]).double().numpy()
        for mine, theirs in zip(scored, dense)
    ]
    found = interval(differences, question.after, question.level, question.seed, these_texts=question.these_texts)
    if found is None:
        return {**UNKNOWN, "difference": float(np.concatenate(differences).mean())}
    return {
        "difference": found.mean,
        "low": found.low,
        "high": found.high,
        "stderr_difference": found.stderr,
        "answer": answer_to(found, question.margin, question.these_texts),
        "speaks_of": found.speaks_of,
    }


def average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def ratio(readings: Sequence[Reading], dense: Sequence[Reading], name: str) -> float | None:
    """The median over prompts of the ratio of a time to dense's time on the same prompt."""
    pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(readings, dense)]
    return median([a / b for a, b in pairs if a is not None and b is not None])
