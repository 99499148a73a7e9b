"""Results on tasks: `sink-eval zeroshot` and `sink-eval longcontext`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from sinkmodel.results.parts import Result, Text
from sinkmodel.results.schema import Number


@dataclass(frozen=True, kw_only=True)
class ZeroshotRow:
    """A metric of a task; `stock`: unchanged lm-eval, `adapter`: with one set of sinks in front of every window."""

    task: str
    metric: str
    filter: str
    questions: int
    stock: Number
    stock_stderr: Number
    adapter: Number
    adapter_stderr: Number
    paper: Number


@dataclass(frozen=True, kw_only=True)
class ZeroshotResult(Result):
    """One model; a row for each metric of each task. `limit`: most questions of a task."""

    COMMAND: ClassVar[str] = "zeroshot"

    model: str
    sink_ids: list[int] = field(default_factory=list)
    limit: int | None = None
    batch_size: int | None = None
    dtype: str | None = None
    device: str | None = None
    lm_eval: str | None = None
    files: list[Text] = field(default_factory=list)
    rows: list[ZeroshotRow]


@dataclass(frozen=True, kw_only=True)
class LongContextRow:
    """A memory on one task at one length; differences are to dense, paired by context.

    Attributes:
        question: whether the question is `inside` or `outside` the compressed prompt.
        score: the task's metric, from 0 to 1.
        exact: the share of the questions for which greedy choices give the whole right answer. None in older files.
        nll: nats per token of the right answer.
        rank: the rank of the right answer among itself and the distractors.
        by_context: the numbers of each context.
        nll_alone: nats of the right answer without the context, with dense.
        gain: nats that the context saves dense.
        floor: whether dense cannot do the task, so that the other memories were not run.
    """

    task: str
    length: int
    question: str
    memory: str | None = None
    budget: Number = None
    label: str
    metric: str | None = None
    contexts: int | None = None
    questions: int | None = None
    prompt_tokens: Number = None
    context_tokens: Number = None
    score: Number
    score_stderr: Number = None
    score_difference: Number
    score_low: Number
    score_high: Number
    exact: Number = None
    exact_stderr: Number = None
    exact_difference: Number = None
    exact_low: Number = None
    exact_high: Number = None
    nll: Number
    nll_stderr: Number = None
    nll_difference: Number
    nll_low: Number
    nll_high: Number
    rank: Number = None
    rank_stderr: Number = None
    rank_difference: Number = None
    rank_low: Number = None
    rank_high: Number = None
    bytes_held: Number
    bytes_kept: Number = None
    seconds: Number = None
    kept_share: Number = None
    by_context: dict[str, Any] = field(default_factory=dict)
    nll_alone: Number = None
    gain: Number = None
    floor: bool


@dataclass(frozen=True, kw_only=True)
class LongContextResult(Result):
    """One model; a row for each memory at each budget, task and length."""

    COMMAND: ClassVar[str] = "longcontext"

    model: str
    sink_ids: list[int] = field(default_factory=list)
    question: str | None = None
    samples: int | None = None
    distractors: int | None = None
    answer_tokens: int | None = None
    sinks: int | None = None
    window: int | None = None
    positions: str | None = None
    layer: int | None = None
    artefact: str | None = None
    seed: int | None = None
    level: Number = None
    floor_score: Number = None
    floor_gain: Number = None
    dtype: str | None = None
    device: str | None = None
    texts: list[Text] = field(default_factory=list)
    longbench: list[Text] = field(default_factory=list)
    rows: list[LongContextRow]
