"""The result of `sink-eval verify`: paired differences of losses, and the verdict on them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from sinkmodel.results.parts import PolicyFields, Result, Text
from sinkmodel.results.schema import Number, omitted

THESE_TEXTS = "these texts"  # `speaks_of` of an interval that does not hold for other texts


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The mean of first − second in nats per token, and its interval.

    Attributes:
        model: the role of the model whose streams they are; `both` if one stream belongs to each model.
        answer: equivalent, better, worse or undecided; None if there is too little text.
        resampled: what the bootstrap resampled.
        freedom: degrees of freedom for the error over texts.
        runs: pairs of twin runs.
        speaks_of: the texts that the interval holds for.
        more_tokens: how many more tokens would give an answer; None if no amount would.
        why: the reason if there is no answer for other texts, or none at all.
        keys_seen_least: for recompute, the fewest keys that a query sees.
        windows: for recompute, windows compared.
        stretches: for dense, stretches compared.
    """

    model: str
    comparison: str | None = None
    first: str
    second: str
    tokens: Number
    difference: Number
    answer: str | None
    low: Number
    high: Number
    stderr: Number = None
    level: Number = None
    blocks: Number = None
    documents: Number = None
    resampled: str | None = None
    freedom: Number = None
    runs: int = 1
    stderr_runs: Number = None
    stderr_texts: Number = None
    speaks_of: str | None = None
    more_tokens: Number = None
    why: str | None = omitted()
    keys_seen_least: int | None = omitted()
    windows: int | None = omitted()
    stretches: int | None = omitted()

    @property
    def answer_cell(self) -> str:
        """The answer for a table; it names the texts that the answer is for unless that is the default."""
        if not self.answer:
            return self.why or "too little text"
        if self.why:
            return f"{self.answer} for other texts"
        return f"{self.answer} for these texts" if self.speaks_of == THESE_TEXTS else self.answer


@dataclass(frozen=True, kw_only=True)
class Verdict(Comparison):
    """The comparison that the verdict is about, over all pairs of runs."""

    model: str = "both"


@dataclass(frozen=True, kw_only=True)
class _Twins:
    """The names of two runs."""

    sink: str
    vanilla: str


@dataclass(frozen=True, kw_only=True)
class PairVerdict(Comparison, _Twins):
    """The verdict of one pair of runs."""

    model: str = "both"


@dataclass(frozen=True, kw_only=True)
class _Role:
    """The first entries of the row of a stream.

    Attributes:
        model: the role of its model, sink or vanilla.
        run: its name; older files do not have it.
    """

    model: str
    run: str | None = omitted()


@dataclass(frozen=True, kw_only=True)
class VerdictRow(PolicyFields, _Role):
    """A stream over the targets that have overflowed in both models."""

    documents: int | None = None
    tokens: Number = None
    tokens_after_overflow: int | None = None
    nll_after_overflow: Number
    ppl_after_overflow: Number = None
    stderr_after_overflow: Number


@dataclass(frozen=True, kw_only=True)
class VerdictResult(Result):
    """The verdict on pairs of models, and the comparisons within each model, which the verdict does not use.

    Attributes:
        sink: the names of the models with a sink, separated by commas.
        vanilla: the names of the models without one.
        pairs: the verdict of each pair alone.
    """

    COMMAND: ClassVar[str] = "verify"

    sink: str
    vanilla: str
    sink_ids: list[int] = field(default_factory=list)
    budget: int
    margin: float
    level: float
    seed: int | None = None
    chunk: int | None = None
    these_texts: bool | None = None
    dtype: str | None = None
    device: str | None = None
    texts: list[Text]
    warnings: list[str]
    verdict: Verdict
    pairs: list[PairVerdict] = field(default_factory=list)
    comparisons: list[Comparison]
    rows: list[VerdictRow]

    @property
    def each_pair(self) -> list[PairVerdict]:
        """The verdict of each pair of runs, as rows of the table of comparisons; empty if there is only one pair."""
        if len(self.pairs) < 2:
            return []
        return [replace(pair, model="pair", first=pair.sink, second=pair.vanilla) for pair in self.pairs]
