"""Results about perplexity: `sink-eval ppl` and `sink-eval grid`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from sinkmodel.results.parts import PolicyFields, Result, Text
from sinkmodel.results.schema import Number


@dataclass(frozen=True, kw_only=True)
class PerplexityRow(PolicyFields):
    """A policy on all documents. "After overflow": at queries p ≥ C; None if there are none.

    Attributes:
        nll: mean nats per token.
        stderr: its standard error over blocks of C tokens.
        by_position: (first, last, nats per token) of positions in bins.
    """

    documents: int | None = None
    tokens: Number
    tokens_after_overflow: int | None = None
    nll: Number
    nll_after_overflow: Number
    ppl: Number = None
    ppl_after_overflow: Number = None
    stderr: Number = None
    stderr_after_overflow: Number
    tokens_per_second: Number = None
    peak_bytes: Number = None
    by_position: list[tuple[int, int, Number]]


@dataclass(frozen=True, kw_only=True)
class PerplexityResult(Result):
    """One model on some texts; a row for each cache policy."""

    COMMAND: ClassVar[str] = "ppl"

    model: str
    sink_ids: list[int] = field(default_factory=list)
    budget: int
    chunk: int | None = None
    dtype: str | None = None
    device: str | None = None
    texts: list[Text] = field(default_factory=list)
    rows: list[PerplexityRow]


@dataclass(frozen=True, kw_only=True)
class GridRun:
    """The loss of one of the twin runs of a row; older files have only its name."""

    run: str
    nll: Number = None
    stderr: Number = None


@dataclass(frozen=True, kw_only=True)
class _Model:
    """The first entries of a row of the grid.

    Attributes:
        model: the name of a group of twin runs.
        sink: the kind of their sink.
    """

    model: str
    sink: str


@dataclass(frozen=True, kw_only=True)
class GridRow(PolicyFields, _Model):
    """A policy on all documents, as mean over twin runs; low and high: Student's interval over them."""

    budget: int
    documents: int | None = None
    tokens_after_overflow: int | None = None
    nll_after_overflow: Number = None
    nll_low: Number = None
    nll_high: Number = None
    ppl_after_overflow: Number
    ppl_low: Number
    ppl_high: Number
    runs: list[GridRun]
    paper_ppl: Number


@dataclass(frozen=True, kw_only=True)
class GridResult(Result):
    """Models × S+W × budgets; a row for each combination.

    Attributes:
        models: the runs of each model, by its name.
    """

    COMMAND: ClassVar[str] = "grid"

    models: dict[str, list[str]]
    budgets: list[int]
    sinks: list[int]
    level: float
    chunk: int | None = None
    dtype: str | None = None
    texts: list[Text]
    warnings: list[str] = field(default_factory=list)
    rows: list[GridRow]
