"""The result of `sink-eval sinks`: where attention goes in one model, or in every checkpoint of a run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

from sinkmodel.results.parts import Result, Text
from sinkmodel.results.schema import Number


@dataclass(frozen=True, kw_only=True)
class Shares:
    """The sink metric and the shares of attention (`eval.measures.attention.shares`); None for a sink that is missing.

    Attributes:
        sink_alpha: the mean attention on the model's own sink.
        sink_heads: the share of heads with a sink there.
        first_alpha: the mean attention on the first text token.
        first_heads: the share of heads with a sink there.
        sink_share: the share of attention on the sink.
        first_share: the share of attention on the first text token.
        rest_share: the share of attention on all other tokens.
    """

    sink_alpha: Number
    sink_heads: Number
    first_alpha: Number
    first_heads: Number
    sink_share: Number
    first_share: Number
    rest_share: Number

    @property
    def shares(self) -> dict[str, Number]:
        return {name: getattr(self, name) for name in SHARES}


SHARES = tuple(field.name for field in fields(Shares))


@dataclass(frozen=True, kw_only=True)
class _Head:
    head: int


@dataclass(frozen=True, kw_only=True)
class Head(Shares, _Head):
    """The numbers of one head."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The largest |activation| that a layer reads.

    Attributes:
        largest_place: its position.
        median: the median |activation| of its sequence.
        massive: whether it is massive, after Sun et al. (arXiv 2402.17762).
    """

    largest: Number
    largest_place: int | None = None
    largest_dimension: int | None = None
    median: Number = None
    times_median: Number
    massive: bool | None = None


PEAK = tuple(field.name for field in fields(Peak))


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Mean norms of keys and values at the sink, at the first text token, and at the rest."""

    key_norm_sink: Number = None
    key_norm_first: Number = None
    key_norm_rest: Number = None
    value_norm_sink: Number = None
    value_norm_first: Number = None
    value_norm_rest: Number = None


@dataclass(frozen=True, kw_only=True)
class _Layer:
    layer: int


@dataclass(frozen=True, kw_only=True)
class LayerRow(Peak, Norms, Shares, _Layer):
    """The numbers of one layer, as means over its heads."""

    heads: list[Head] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Largest:
    largest_layer: int | None = None


@dataclass(frozen=True, kw_only=True)
class Overall(Peak, _Largest, Shares):
    """Means over all layers, and the largest |activation| of all."""


@dataclass(frozen=True, kw_only=True)
class _Step:
    step: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class CheckpointRow(Overall, _Step):
    """One checkpoint of a run; `heads_by_place`: the share of heads with a sink at each of the first positions."""

    heads_by_place: list[float] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Birth:
    """When the sink was born.

    Attributes:
        target: `sink`, or `first` for a model without a sink.
        threshold: the share of heads above which the sink counts as born.
        step: the first step from which all checkpoints are above it; None if the last is not.
        tokens: the training tokens at that step.
    """

    target: str
    threshold: Number
    step: Number
    tokens: Number


@dataclass(frozen=True, kw_only=True)
class Sinks(Result):
    """What both results share: `sequences` pieces of text of `length` tokens, and ε of the sink metric."""

    COMMAND: ClassVar[str] = "sinks"

    model: str
    sink_ids: list[int] = field(default_factory=list)
    length: int
    sequences: int
    epsilon: Number
    dtype: str | None = None
    device: str | None = None
    texts: list[Text]


@dataclass(frozen=True, kw_only=True)
class SinksResult(Sinks):
    """One model; `heads_by_place`: the share of heads with a sink at each of the first positions."""

    rows: list[LayerRow]
    overall: Overall | None = None
    heads_by_place: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class BirthResult(Sinks):
    """Every checkpoint of a run."""

    rows: list[CheckpointRow]
    born: Birth
