"""Scores answers in a stream: their nats under teacher forcing, and whether greedy decoding would give them.

Each candidate is scored on a copy of the stream, one candidate after the other, in batches of one shape. So scoring
does not change the stream, and equal candidates get equal nats. A copy costs one pass over the cache, which is little
compared to the text between two queries. Scoring the candidates as rows of one batch would need a cache for each.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eval.measures.statistics import block_stderr, by_position, mean
from eval.measures.streams.lines import Query
from eval.measures.streams.questions import BETWEEN, Asked
from eval.policies.policy import Policy, Stream
from sinkmodel.errors import UserError
from sinkmodel.loading import LoadedModel, encode
from sinkmodel.progress import CountedProgress
from sinkmodel.results.streams import LinesRow, QuestionsRow
from sinkmodel.scoring import nll_of

BINS = 20  # along a stream


# --------------------------------------------------------------------------------------------------------------- lines


def measure_lines(model: Any, policy: Policy, samples: Sequence[Sequence[Query]], rows: int, label: str) -> LinesRow:
    """One result row: means over all queries of all samples, with standard errors that treat a sample as one block."""
    queries = [query for sample in samples for query in sample]
    started = time.perf_counter()
    with CountedProgress(label, "queries", len(queries)) as progress:
        right, nll, rank = ask_lines(model, policy, samples, rows, progress.add)
    seconds = time.perf_counter() - started
    longest = max(query.place + len(query.candidates[0]) for query in queries)
    return LinesRow(
        **vars(policy.row(longest)),
        accuracy=mean(right),
        accuracy_stderr=block_stderr(right, len(samples[0])),
        nll=mean(nll),
        nll_stderr=block_stderr(nll, len(samples[0])),
        rank=mean(rank),
        rank_stderr=block_stderr(rank, len(samples[0])),
        tokens_back_least=min(query.back for query in queries),
        tokens_back_most=max(query.back for query in queries),
        kept=sum(kept(query, policy) for query in queries) / len(queries),
        accuracy_by_query=by_position([(0, part) for part in right], BINS),
        tokens_per_second=sum(len(query.fed) for query in queries) / seconds,
    )


def ask_lines(
    model: Any, policy: Policy, samples: Sequence[Sequence[Query]], rows: int, on_queries: Callable[[int], None]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Score every query of every sample; `rows` samples at a time are rows of one batch.

    Returns three lists, each with one fp32 tensor [queries] per sample: 1 if greedy decoding would have given the
    answer, else 0; the nats of the whole answer; its rank among the candidates.
    """
    right: list[Tensor] = []
    nll: list[Tensor] = []
    rank: list[Tensor] = []
    for start in range(0, len(samples), rows):
        stream, answers = policy.stream(model), []
        for queries in zip(*samples[start : start + rows]):  # the first of each sample, the second, …
            first_RV = stream.feed(torch.tensor([query.fed for query in queries], device=model.device))
            candidates_RKA = torch.tensor([query.candidates for query in queries], device=model.device)
            scored = [answer_nll(stream, first_RV, ids_RA) for ids_RA in candidates_RKA.unbind(1)]
            nll_RK = torch.stack([nll_RA.sum(1) for nll_RA, _ in scored], dim=1)
            greedy_R = scored[0][1].all(1)
            answers.append(torch.stack([greedy_R.float(), nll_RK[:, 0], rank_of_first(nll_RK)]).cpu())
            on_queries(len(queries))
        for kind, found_RQ in zip((right, nll, rank), torch.stack(answers, dim=2)):
            kind += found_RQ.unbind()
    return right, nll, rank


def rank_of_first(nll_RK: Tensor) -> Tensor:
    """The rank [R] of column 0 among all K, from 1 (the likeliest) to K; ties get the middle rank."""
    first_R1, others_RK = nll_RK[:, :1], nll_RK[:, 1:]
    return 1 + (others_RK < first_R1).sum(1) + (others_RK == first_R1).sum(1) / 2


def kept(query: Query, policy: Policy) -> bool:
    """Whether the whole line that a query asks for is still cached when the last token of the answer is predicted."""
    window = policy.keys_seen(sys.maxsize) - policy.sinks
    among_sinks = max(0, policy.sinks - query.line)  # these tokens of the line are never evicted
    return query.end <= policy.sinks or query.back - among_sinks <= window


# ----------------------------------------------------------------------------------------------------------- questions


def measure_questions(
    loaded: LoadedModel, policy: Policy, questions: Sequence[Asked], alone: list[int] | None, label: str
) -> QuestionsRow:
    """One result row: for a stream, with its difference to one-shot over the same questions, or for one-shot itself.

    Args:
        alone: for each question 1 if one-shot answered it correctly, else 0; None measures one-shot itself.
    """
    started = time.perf_counter()
    with CountedProgress(label, "questions", len(questions)) as progress:
        right, nll, lengths = ask_questions(loaded, policy, questions, alone is None, progress.add)
    seconds = time.perf_counter() - started
    fields = policy.row(max(n + max(map(len, question.choices)) - 1 for n, question in zip(lengths, questions)))
    if alone is None:
        fields = replace(fields, policy="one-shot", label="one-shot")
    difference = None if alone is None else right - torch.tensor(alone)
    tokens = sum(lengths) if alone is None else lengths[-1]
    return QuestionsRow(
        **vars(fields),
        accuracy=mean([right]),
        accuracy_stderr=block_stderr([right], 1),
        difference=None if difference is None else mean([difference]),
        difference_stderr=None if difference is None else block_stderr([difference], 1),
        nll=mean([nll]),
        nll_stderr=block_stderr([nll], 1),
        tokens=tokens,
        right=right.int().tolist(),
        tokens_per_second=tokens / seconds,
    )


def ask_questions(
    loaded: LoadedModel, policy: Policy, questions: Sequence[Asked], one_shot: bool, on_question: Callable[[int], None]
) -> tuple[Tensor, Tensor, list[int]]:
    """Choose among the choices by log-likelihood per character, as lm-eval's acc_norm does for ARC.

    The questions are read one after the other in one stream, each followed by its right answer. With `one_shot`, each
    question has its own stream, which starts with the model's sinks. Returns for each question: 1 if the choice was
    right, else 0; the nats of the right choice; how many tokens its stream had been fed.
    """
    model, between = loaded.model, encode(loaded, BETWEEN)
    right: list[float] = []
    nll: list[float] = []
    lengths: list[int] = []
    for question in questions:
        if one_shot or not lengths:
            stream, fed, length = policy.stream(model), list(loaded.sink_ids), 0
        fed = fed + question.prompt
        length += len(fed)
        first_1V = stream.feed(torch.tensor([fed], device=model.device))
        nats = [
            answer_nll(stream, first_1V, torch.tensor([choice], device=model.device))[0].sum().item()
            for choice in question.choices
        ]
        a_character = [value / count for value, count in zip(nats, question.characters)]
        right.append(float(a_character.index(min(a_character)) == question.answer))
        nll.append(nats[question.answer])
        lengths.append(length)
        fed = question.right + between
        on_question(1)
    return torch.tensor(right), torch.tensor(nll), lengths


# ----------------------------------------------------------------------------------------------------------------- both


def answer_nll(stream: Stream, first_RV: Tensor, ids_RA: Tensor) -> tuple[Tensor, Tensor]:
    """−log p of each token of an answer, and whether it is the likeliest, both [R, A]; the stream is not changed.

    `first_RV` are the stream's logits after the question. Greedy decoding gives the answer if and only if each of its
    tokens is the likeliest after those before it, so nothing has to be generated.
    """
    logits_RAV = first_RV[:, None]
    if ids_RA.shape[1] > 1:
        logits_RAV = torch.cat([logits_RAV, stream.fork().feed_all(ids_RA[:, :-1])], dim=1)
    nll_RA = nll_of(logits_RAV, ids_RA)
    if not bool(torch.isfinite(nll_RA).all()):
        raise UserError("the model gives logits that are not finite; try --dtype float32, or copy the model again")
    return nll_RA, logits_RAV.argmax(-1) == ids_RA
