"""The result of `sink-eval streameval`: lines by distance, or questions one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from sinkmodel.results.parts import PolicyFields, Result, Text
from sinkmodel.results.schema import Number


@dataclass(frozen=True, kw_only=True)
class LinesRow(PolicyFields):
    """A policy at one distance; standard errors are over samples.

    Attributes:
        nll: nats of the answer.
        rank: the rank of the answer among the candidates.
        kept: the share of queries whose line is whole in the cache.
        accuracy_by_query: (first, last, accuracy) of queries in bins along a stream.
        distance: lines from the one asked for to the latest.
    """

    accuracy: Number
    accuracy_stderr: Number
    nll: Number
    nll_stderr: Number
    rank: Number = None
    rank_stderr: Number = None
    tokens_back_least: int | None = None
    tokens_back_most: Number = None
    kept: Number = None
    accuracy_by_query: list[tuple[int, int, Number]] = field(default_factory=list)
    tokens_per_second: Number = None
    distance: Number = None


@dataclass(frozen=True, kw_only=True)
class QuestionsRow(PolicyFields):
    """A policy over all questions; standard errors are over questions.

    Attributes:
        difference: accuracy minus that of one-shot, paired by question.
        nll: nats of the right choice.
        right: for each question 1 if the choice was right, else 0.
    """

    accuracy: Number
    accuracy_stderr: Number
    difference: Number = None
    difference_stderr: Number = None
    nll: Number
    nll_stderr: Number
    tokens: int | None = None
    right: list[int] = field(default_factory=list)
    tokens_per_second: Number = None


@dataclass(frozen=True, kw_only=True)
class StreamEvalResult(Result):
    """What both tasks share."""

    COMMAND: ClassVar[str] = "streameval"

    model: str
    sink_ids: list[int] = field(default_factory=list)
    task: str
    seed: int | None = None
    dtype: str | None = None
    device: str | None = None


@dataclass(frozen=True, kw_only=True)
class LinesResult(StreamEvalResult):
    """StreamEval's lines."""

    task: str = "lines"
    every: int | None = None
    samples: int | None = None
    queries: int | None = None
    distractors: int | None = None
    line_tokens_least: int | None = None
    line_tokens_most: int | None = None
    answer_tokens: int | None = None
    rows: list[LinesRow]


@dataclass(frozen=True, kw_only=True)
class QuestionsResult(StreamEvalResult):
    """Questions one after the other."""

    task: str = "questions"
    texts: list[Text] = field(default_factory=list)
    questions: int | None = None
    rows: list[QuestionsRow]
