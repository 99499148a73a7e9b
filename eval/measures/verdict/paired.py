"""The comparisons of a verdict: two streams on the same targets, and the difference of their losses.

A text is x0 … x(N−1). A model puts its own k sink tokens in front, so its query at position p predicts x(p + 1 − k).
Losses are indexed by target, so that models with different k line up: index i is target x(i + 1), predicted at position
k + i. Targets with i ≥ C have overflowed (p ≥ C) in every model, since a vanilla model has k = 0.

Within one model, a stream is also compared to the two methods that it approximates. Both are slow, so they get only
about `beside` tokens, from positions spread evenly over the texts:

    recompute   the window is read again for its last queries. A window of C tokens scores its last C / 16 queries,
                which see at least 15 / 16 of C keys; windows are at least C tokens apart
    dense       within the model's positions P: stretches of P tokens, each a stream of its own, are compared at the
                queries C ≤ p < P
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eval.measures.statistics import block_stderr, mean
from eval.measures.verdict.equivalence import (
    Series,
    answer_to,
    interval,
    more_tokens,
    no_sample,
    over_runs,
)
from eval.policies.caches import Dense, Streaming
from eval.policies.options import BORROWED
from eval.policies.policy import Policy, end_of
from eval.policies.recompute import Recompute
from sinkmodel.errors import UserError
from sinkmodel.loading import LoadedModel
from sinkmodel.perplexity import perplexity
from sinkmodel.progress import CountedProgress
from sinkmodel.results.verdict import Comparison, VerdictRow

Documents = Sequence[Sequence[int]]  # text tokens without sinks
SHARE = 16  # a recomputed window scores the last 1 / SHARE of its queries


@dataclass(frozen=True)
class Question:
    """What all comparisons of one verdict share; `these_texts`: the verdict is only about the given texts."""

    budget: int
    margin: float
    level: float
    seed: int
    chunk: int
    these_texts: bool = False


@dataclass(frozen=True)
class Side:
    """One of the two models, and how many leading tokens its stream keeps in the verdict."""

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
        model: the role of the model whose streams they are; `both` if one stream belongs to each model.
        differences: the losses of the first stream minus those of the second, in nats, one series per document.
        block: tokens per block of the bootstrap.
        more: further entries of its row.
    """

    model: str
    first: str
    second: str
    differences: list[Series]
    block: int
    more: dict[str, Any]


@dataclass(frozen=True)
class Alone:
    """The scores of one model, which do not depend on the model that it is compared with.

    Attributes:
        losses: the losses of its stream in the verdict, in nats, one series per document.
        stream: the row of that stream.
        rows: the rows of its other streams.
        pairs: the comparisons within this model.
    """

    losses: list[Series]
    stream: VerdictRow
    rows: list[VerdictRow]
    pairs: list[Pair]


def measure(side: Side, documents: Documents, question: Question, beside: int) -> Alone:
    """Score one model: its stream in the verdict over all texts, and its other streams over parts of them.

    Args:
        beside: text tokens for each comparison within the model.
    """
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


def compared(sides: tuple[Side, Side], found: tuple[Alone, Alone], budget: int) -> tuple[list[Pair], list[VerdictRow]]:
    """The pair that the verdict is about, then the pairs within each model; and a row for each scored stream."""
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
    """Losses by target, in nats, fp32: N − 1 for a document of N text tokens. A UserError names the failing model."""
    fed = [array("i", [*side.front, *ids]) for ids in documents]
    with CountedProgress(f"{side.role} model, {task}", "tokens", sum(len(ids) - 1 for ids in fed)) as progress:
        try:
            nll = policy.score(side.loaded.model, fed, chunk, progress.add)
        except UserError as error:
            raise UserError(f"{side.loaded.name}: {error}") from None
    return [part[len(side.front) :].numpy() for part in nll]


def after(losses: Sequence[Series], budget: int) -> list[Series]:
    """The losses on targets that have overflowed in every model."""
    return [part[budget:] for part in losses]


def paired(
    model: str, first: str, second: str, a: Sequence[Series], b: Sequence[Series], block: int, **more: Any
) -> Pair:
    return Pair(model, first, second, [x.astype(np.float64) - y for x, y in zip(a, b)], block, more)


def answered(question: Question, runs: Sequence[Pair]) -> Comparison:
    """A result row: the mean of first − second in nats per token, its interval and the answer.

    The answer is None if there is too little text. If the interval holds for these texts only and the question is about
    other texts, the answer is undecided, and `why` has the reason.

    Args:
        runs: the same comparison on the same targets, once for each pair of twin runs.
    """
    one = runs[0]
    means = [sum(float(d.sum()) for d in run.differences) for run in runs]
    tokens = sum(map(len, one.differences))
    means = [total / tokens for total in means] if tokens else []
    row: dict[str, Any] = {
        "model": one.model,
        "comparison": f"{one.first} against {one.second}",
        "first": one.first,
        "second": one.second,
        "tokens": tokens,
        "difference": sum(means) / len(means) if means else None,
        **one.more,
    }
    over = [np.mean(series, axis=0) for series in zip(*(run.differences for run in runs))]
    found = interval(over, one.block, question.level, question.seed, these_texts=question.these_texts)
    if found is None:
        return Comparison(**row, answer=None, low=None, high=None, runs=len(runs))
    found = over_runs(found, means)
    row |= {name: value for name, value in vars(found).items() if name not in ("mean", "tokens")}
    row |= {"answer": answer_to(found, question.margin, question.these_texts), "speaks_of": found.speaks_of}
    if found.speaks_of == "these texts" and not question.these_texts:
        return Comparison(**{"why": no_sample([len(series) for series in over]), **row})
    return Comparison(**row, more_tokens=more_tokens(found, question.margin))


def stream_row(side: Side, policy: Policy, scored: Sequence[Series], documents: Documents, budget: int) -> VerdictRow:
    """A row like those of `ppl`, over the targets that have overflowed in both models."""
    late = [torch.from_numpy(part) for part in after(scored, budget)]
    nll = mean(late)
    return VerdictRow(
        model=side.role,
        run=side.loaded.name,
        **vars(policy.row(max(map(len, documents)) + len(side.front) - 1)),
        documents=len(documents),
        tokens=sum(len(ids) - 1 for ids in documents),
        tokens_after_overflow=sum(map(len, late)),
        nll_after_overflow=nll,
        ppl_after_overflow=perplexity(nll),
        stderr_after_overflow=block_stderr(late, budget),
    )


def beginnings(documents: Documents, budget: int, most: int) -> Documents:
    """The first tokens of every document, in proportion to its length: about `most` in all, at least 2C + 1 of each."""
    share = min(1.0, most / sum(map(len, documents)))
    return [ids[: max(round(share * len(ids)), 2 * budget + 1)] for ids in documents]


# ----------------------------------------------------------------------- against what a stream approximates


def against_recompute(
    side: Side, question: Question, streamed: Sequence[Series], documents: Documents, beside: int
) -> Pair:
    """S+W, already scored as `streamed`, against recomputed windows, whose queries see `keys_seen_least` or more."""
    window = question.budget - len(side.front)
    answers = max(1, question.budget // SHARE)
    policy = Recompute(len(side.front), question.budget, answers)
    places = spread(  # (document, end): a window's last query predicts the token at `end`
        [range(question.budget + answers, len(ids), question.budget) for ids in documents],
        max(1, beside // question.budget),
    )
    windows = [documents[i][end - window : end + 1] for i, end in places]
    # Recompute is one causal forward over each window from scratch; only the last losses of a window are used.
    recomputed = losses(side, Dense(), windows, question.chunk, policy.label) if windows else []
    kept = [streamed[i][end - answers : end] for i, end in places]
    label = streaming(side.sinks, question.budget).label
    return paired(
        side.role,
        label,
        policy.label,
        by_document(kept, places, len(documents)),
        by_document([part[-answers:] for part in recomputed], places, len(documents)),
        answers,  # one block per window: windows are so far apart that they share no cached key
        keys_seen_least=question.budget - answers + 1,
        windows=len(windows),
    )


def against_dense(side: Side, question: Question, documents: Documents, beside: int) -> Pair:
    """S+W against dense attention, within the model's positions; without numbers if they do not exceed C."""
    budget, front = question.budget, len(side.front)
    positions = min((n for n in (side.loaded.positions, end_of(side.loaded.model)) if n is not None), default=None)
    policy = streaming(side.sinks, budget)
    if positions is None or positions <= budget:
        ends = "are not known" if positions is None else f"end at {positions}"
        why = f"the model's positions {ends}"
        return paired(side.role, policy.label, "dense", [], [], budget, stretches=0, why=why)
    length = positions - front + 1  # text tokens of a stretch; the last is only predicted
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
        positions - budget,  # one block per stretch
        stretches=len(stretches),
    )


def spread(places: Sequence[Sequence[int]], most: int) -> list[tuple[int, int]]:
    """At most `most` of all places, evenly spaced in the order of the texts, as (document, place)."""
    every = [(i, place) for i, of_document in enumerate(places) for place in of_document]
    if len(every) <= most:
        return every
    return [every[(2 * j + 1) * len(every) // (2 * most)] for j in range(most)]


def by_document(parts: Sequence[Series], places: Sequence[tuple[int, int]], documents: int) -> list[Series]:
    """Concatenate the parts of each document: one series per document."""
    grouped: list[list[Series]] = [[np.empty(0, np.float32)] for _ in range(documents)]
    for (i, _), part in zip(places, parts):
        grouped[i].append(part)
    return [np.concatenate(group) for group in grouped]
