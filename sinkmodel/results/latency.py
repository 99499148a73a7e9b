"""Results of `sink-eval latency`: decoding steps under cache policies, and with --prefill prompts with KV memories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sinkmodel.results.parts import PolicyFields, Result
from sinkmodel.results.schema import Number

ENOUGH = 5  # fewest rounds for an interval


@dataclass(frozen=True, kw_only=True)
class LatencyRow(PolicyFields):
    """A policy at one budget; the budget of dense is the number of keys that it holds."""

    budget: int
    tokens: int | None = None
    ms_per_token: Number
    ms_per_token_p99: Number
    peak_bytes: Number


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The median over rounds of the ratio of two sides' times, and its 95 % interval by bootstrap."""

    budget: int
    ratio: str
    value: Number
    low: Number
    high: Number
    rounds: int


@dataclass(frozen=True, kw_only=True)
class StreamRow(PolicyFields):
    """Steps after `seen` tokens of a stream; `value` is the ratio to a stream that has just filled its cache."""

    seen: int
    tokens: int | None = None
    ms_per_token: Number
    ms_per_token_p99: Number
    ratio: str | None = None
    value: Number
    low: Number
    high: Number
    rounds: int | None = None
    resident_bytes: Number


@dataclass(frozen=True, kw_only=True)
class LatencyResult(Result):
    """One model; `ratios` are between policies at one budget, `stream` has steps along a long stream."""

    COMMAND: ClassVar[str] = "latency"

    model: str
    dtype: str
    device: str
    threads: int
    rows: list[LatencyRow]
    ratios: list[Ratio]
    stream: list[StreamRow]


@dataclass(frozen=True, kw_only=True)
class AnswerTimes:
    """The cost of an answer of `answer` tokens: of a step at its end, and of the whole answer with its prompt."""

    answer: int
    step_ms: Number
    step_ratio: Number
    step_low: Number
    step_high: Number
    total_ms: Number
    total_ratio: Number
    total_low: Number
    total_high: Number


@dataclass(frozen=True, kw_only=True)
class PrefillRow:
    """A memory at one prompt length; `ttft`: time to the first token, ratios are to dense.

    Attributes:
        reading_bytes: the part of the peak that reading the prompt added.
        bytes_grown: by how much the process is larger than before.
    """

    length: int
    memory: str | None = None
    budget: Number = None
    label: str
    rounds: int
    ttft_ms: Number
    ttft_ratio: Number
    ttft_low: Number
    ttft_high: Number
    peak_bytes: Number
    reading_bytes: Number
    bytes_held: Number
    bytes_kept: Number = None
    kept_share: Number = None
    bytes_grown: Number
    answers: list[AnswerTimes]


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """The shortest answer, in tokens, that takes `first` longer than `second`; None: never."""

    length: int
    first: str
    second: str
    crossover: Number
    low: Number
    high: Number
    rounds: int

    @property
    def interval(self) -> str:
        """`[low, high]`; a dash if there are too few rounds for an interval."""
        if self.rounds < ENOUGH:
            return "–"
        if self.low is None:
            return "never"
        return f"[{tokens_or_never(self.low)}, {tokens_or_never(self.high)}]"


def tokens_or_never(value: float | None) -> str:
    return "never" if value is None else f"{value:,.0f}"


@dataclass(frozen=True, kw_only=True)
class PrefillResult(Result):
    """One model; a row for each memory at each prompt length. `weights_bytes`: the bytes of its weights."""

    COMMAND: ClassVar[str] = "latency --prefill"

    model: str
    dtype: str
    device: str
    threads: int
    weights_bytes: int
    rounds: int | None = None
    rows: list[PrefillRow]
    crossovers: list[Crossover]
