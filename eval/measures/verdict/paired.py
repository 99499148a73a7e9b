"""The verdict and what stands beside it: two streams on the same targets, and how far apart their losses are.

A text is x0 … x(N−1); a model puts its own k sink tokens in front, so its query at place p predicts x(p + 1 − k).
Losses are kept by target, x1 first, whatever stands in front: index i is target x(i + 1), predicted at place k + i.
After overflow (p ≥ C) in every model are the targets with i ≥ C, for a vanilla model has k = 0.

Within one model a stream is also held to the two things that it stands for. Both are slow, so they get as many tokens
as `beside` allows, from places spread evenly over the texts:

    recompute   the window read anew, at queries far behind the start. A window of C tokens answers for its last C / 16
                queries, which see 15 / 16 of C keys or more; windows lie C tokens apart or more
    dense       while it lasts: stretches of text as long as the model has positions P, each a stream of its own, at the
                queries C ≤ p < P
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eval.measures.perplexity import perplexity
from eval.measures.statistics import block_stderr, mean
from eval.measures.verdict.equivalence import (
    DOCUMENTS,
    Interval,
    Series,
    decide,
    effective_documents,
    interval,
    is_sample,
    more_tokens,
    over_runs,
)
from eval.policies.choice import BORROWED
from eval.policies.dense import Dense
from eval.policies.policy import end_of
from eval.policies.recompute import Recompute
from eval.policies.streaming import Streaming
from sinkmodel.errors import UserError
from sinkmodel.progress import CountedProgress

if TYPE_CHECKING:
    from eval.policies.policy import Policy
    from sinkmodel.loading import LoadedModel

Documents = Sequence[Sequence[int]]  # text tokens, no sinks; arrays where there are many
SHARE = 16  # a window that is read anew answers for one in so many of its queries


@dataclass(frozen=True)
class Question:
    """What all comparisons of one verdict have in common; `these_texts`: it is about no other texts than the given."""

    budget: int
    margin: float
    level: float
    seed: int
    chunk: int
    these_texts: bool = False


@dataclass(frozen=True)
class Side:
    """One of the two models, and how many first tokens it keeps in the verdict."""

    role: str
    loaded: LoadedModel
    sinks: int

    @property
    def front(self) -> list[int]:
        return self.loaded.sink_ids


@dataclass(frozen=True)
class Pair:
    """Two streams on the same targets.

    Attributes:
        model: whose streams they are; `both` where each model has one.
        differences: the losses of the first less those of the second, one series a document.
        block: tokens of a block of the bootstrap.
        more: what else its row says.
    """

    model: str
    first: str
    second: str
    differences: list[Series]
    block: int
    more: dict[str, Any]


@dataclass(frozen=True)
class Alone:
    """What is scored of one model, whatever it is compared with.

    Attributes:
        losses: of its stream in the verdict, one series a document.
        stream: the row of that stream.
        rows: of its other streams.
        pairs: the comparisons within it.
    """

    losses: list[Series]
    stream: dict[str, Any]
    rows: list[dict[str, Any]]
    pairs: list[Pair]


def measure(side: Side, documents: Documents, question: Question, beside: int) -> Alone:
    """Score one model: its stream in the verdict over all texts, and what that is held to over some of them."""
    budget = question.budget
    policy = streaming(side.sinks, budget)
    streamed = losses(side, policy, documents, question.chunk, policy.label)
    heads = beginnings(documents, budget, beside)
    scored = {side.sinks: [part[: len(ids) - 1] for part, ids in zip(streamed, heads)]}
    rows, pairs = [], []
    for count in sorted({0, 1, BORROWED} - {side.sinks}):
        other = streaming(count, budget)
        scored[count] = losses(side, other, heads, question.chunk, other.label)
        rows.append(stream_row(side, other, scored[count], heads, budget))
    late = {count: after(part, budget) for count, part in scored.items()}
    of_four = streaming(BORROWED, budget).label
    for count in sorted(scored.keys() - {BORROWED}, reverse=True):
        label = streaming(count, budget).label
        pairs.append(paired(side.role, label, of_four, late[count], late[BORROWED], budget))
    pairs.append(against_recompute(side, question, streamed, documents, beside))
    pairs.append(against_dense(side, question, documents, beside))
    return Alone(streamed, stream_row(side, policy, streamed, documents, budget), rows, pairs)


def compared(
    sides: tuple[Side, Side], found: tuple[Alone, Alone], budget: int
) -> tuple[list[Pair], list[dict[str, Any]]]:
    """The pair that the verdict is about, then those within each model; and a row for each stream that was scored."""
    first, second = (f"{side.role} {side.sinks}+{budget - side.sinks}" for side in sides)
    a, b = (after(alone.losses, budget) for alone in found)
    pairs = [paired("both", first, second, a, b, budget)]
    rows = [alone.stream for alone in found]
    for alone in found:
        pairs += alone.pairs
        rows += alone.rows
    return pairs, rows


def streaming(sinks: int, budget: int) -> Streaming:
    return Streaming("sink" if sinks else "window", sinks, budget)


def losses(side: Side, policy: Policy, documents: Documents, chunk: int, task: str) -> list[Series]:
    """By target: for each document of N text tokens N − 1 losses in nats, fp32. UserError names a model that fails."""
    fed = [array("i", [*side.front, *ids]) for ids in documents]
    with CountedProgress(f"{side.role} model, {task}", "tokens", sum(len(ids) - 1 for ids in fed)) as progress:
        try:
            nll = policy.score(side.loaded.model, fed, chunk, progress.add)
        except UserError as error:
            raise UserError(f"{side.loaded.name}: {error}") from None
    return [part[len(side.front) :].numpy() for part in nll]


def after(losses: Sequence[Series], budget: int) -> list[Series]:
    """Those on targets that have overflowed in every model."""
    return [part[budget:] for part in losses]


def paired(
    model: str, first: str, second: str, a: Sequence[Series], b: Sequence[Series], block: int, **more: Any
) -> Pair:
    return Pair(model, first, second, [x.astype(np.float64) - y for x, y in zip(a, b)], block, more)


def answered(question: Question, runs: Sequence[Pair]) -> dict[str, Any]:
    """A row: the mean of first − second in nats per token, its interval and answer; None where the texts are too few.

    If the interval speaks of these texts alone and the question does not, the answer is undecided, and `why` has the
    reason.

    Args:
        runs: the same comparison, on the same targets, of each pair of twin runs.
    """
    one = runs[0]
    means = [sum(float(d.sum()) for d in run.differences) for run in runs]
    tokens = sum(map(len, one.differences))
    means = [total / tokens for total in means] if tokens else []
    row = {
        "model": one.model,
        "comparison": f"{one.first} against {one.second}",
        "first": one.first,
        "second": one.second,
        "tokens": tokens,
        "difference": sum(means) / len(means) if means else None,
    }
    over = [np.mean(series, axis=0) for series in zip(*(run.differences for run in runs))]
    found = interval(over, one.block, question.level, question.seed, these_texts=question.these_texts)
    if found is None:
        unknown = [field.name for field in fields(Interval) if field.name not in ("mean", "tokens", "runs")]
        unknown.append("speaks_of")
        return {**row, "answer": None, **dict.fromkeys(unknown), "runs": len(runs), "more_tokens": None, **one.more}
    found = over_runs(found, means)
    known = {name: value for name, value in vars(found).items() if name not in ("mean", "tokens")}
    known["speaks_of"] = found.speaks_of
    if found.speaks_of == "these texts" and not question.these_texts:
        why = no_sample([len(series) for series in over])
        return {**row, "answer": "undecided", **known, "more_tokens": None, "why": why, **one.more}
    more = more_tokens(found, question.margin)
    return {**row, "answer": decide(found, question.margin), **known, "more_tokens": more, **one.more}


def no_sample(lengths: Sequence[int]) -> str:
    """Why documents of these lengths say nothing of other texts, and what to do."""
    used = [length for length in lengths if length]
    weight = effective_documents(np.array(used, dtype=np.float64))
    what = f"{len(used)} document{'s' if len(used) != 1 else ''}"
    if weight < len(used) - 0.005:
        what += f" of unequal length weigh as {math.floor(100 * weight) / 100:g} of one length"
    more = 0
    while not is_sample([*used, *[max(used)] * more]):
        more += 1
    return (
        f"{what}, and {DOCUMENTS} are needed to speak of other texts; give {more} more as long as the longest, or ask "
        "about these alone with --these-texts"
    )


def stream_row(
    side: Side, policy: Policy, scored: Sequence[Series], documents: Documents, budget: int
) -> dict[str, Any]:
    """As a row of `ppl`, on the targets that have overflowed in both models."""
    late = [torch.from_numpy(part) for part in after(scored, budget)]
    nll = mean(late)
    return {
        "model": side.role,
        "run": side.loaded.name,
        **policy.row(max(map(len, documents)) + len(side.front) - 1),
        "documents": len(documents),
        "tokens": sum(len(ids) - 1 for ids in documents),
        "tokens_after_overflow": sum(map(len, late)),
        "nll_after_overflow": nll,
        "ppl_after_overflow": perplexity(nll),
        "stderr_after_overflow": block_stderr(late, budget),
    }


def beginnings(documents: Documents, budget: int, most: int) -> Documents:
    """The first tokens of every document, in proportion to its length: about `most` in all, and a budget's overflow."""
    share = min(1.0, most / sum(map(len, documents)))
    return [ids[: max(round(share * len(ids)), 2 * budget + 1)] for ids in documents]


# -------------------------------------------------------------------------- against what a stream stands for


def against_recompute(
    side: Side, question: Question, streamed: Sequence[Series], documents: Documents, beside: int
) -> Pair:
    """S+W, scored in full as `streamed`, against the window read anew; `keys_seen_least` says how short a window is."""
    window = question.budget - len(side.front)
    answers = max(1, question.budget // SHARE)
    policy = Recompute(len(side.front), question.budget, answers)
    places = spread(  # (document, end): its last query predicts the token at `end`
        [range(question.budget + answers, len(ids), question.budget) for ids in documents],
        max(1, beside // question.budget),
    )
    windows = [documents[i][end - window : end + 1] for i, end in places]
    # One causal forward over a window from scratch is what Recompute does; of its losses the last are taken.
    anew = losses(side, Dense(), windows, question.chunk, policy.label) if windows else []
    kept = [streamed[i][end - answers : end] for i, end in places]
    label = streaming(side.sinks, question.budget).label
    return paired(
        side.role,
        label,
        policy.label,
        by_document(kept, places, len(documents)),
        by_document([read[-answers:] for read in anew], places, len(documents)),
        answers,  # a window is a block: windows lie so far apart that they share no cached key
        keys_seen_least=question.budget - answers + 1,
        windows=len(windows),
    )


def against_dense(side: Side, question: Question, documents: Documents, beside: int) -> Pair:
    """S+W against every key, as far as the model has positions; without numbers where it does not go beyond C."""
    budget, front = question.budget, len(side.front)
    positions = min((n for n in (side.loaded.positions, end_of(side.loaded.model)) if n is not None), default=None)
    policy = streaming(side.sinks, budget)
    if positions is None or positions <= budget:
        ends = "are not known" if positions is None else f"end at {positions}"
        why = f"the model's positions {ends}"
        return paired(side.role, policy.label, "dense", [], [], budget, stretches=0, why=why)
    length = positions - front + 1  # text tokens of a stretch; the last is predicted, never fed
    places = spread(
        [[start for start in range(0, len(ids), length) if len(ids) - start > budget + 1] for ids in documents],
        max(1, beside // positions),
    )
    stretches = [documents[i][start : start + length] for i, start in places]
    stream, dense = (
        after(losses(side, p, stretches, question.chunk, f"{p.label}, stretches"), budget - front) if stretches else []
        for p in (policy, Dense())
    )
    return paired(
        side.role,
        policy.label,
        "dense",
        by_document(stream, places, len(documents)),
        by_document(dense, places, len(documents)),
        positions - budget,  # a stretch is a block
        stretches=len(stretches),
    )


def spread(places: Sequence[Sequence[int]], most: int) -> list[tuple[int, int]]:
    """`most` of all places, evenly in the order of the texts, as (document, place); all where there are no more."""
    every = [(i, place) for i, of_document in enumerate(places) for place in of_document]
    if len(every) <= most:
        return every
    return [every[(2 * j + 1) * len(every) // (2 * most)] for j in range(most)]


def by_document(parts: Sequence[Series], places: Sequence[tuple[int, int]], documents: int) -> list[Series]:
    """One series a document, of the parts that came from it."""
    grouped: list[list[Series]] = [[np.empty(0, np.float32)] for _ in range(documents)]
    for (i, _), part in zip(places, parts):
        grouped[i].append(part)
    return [np.concatenate(group) for group in grouped]
