"""The result of `sink-eval memories`: KV memories on the same prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from sinkmodel.results.parts import Result, Text
from sinkmodel.results.schema import Number, named, omitted


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """A memory at one budget; `difference` is to dense, paired by token, and ratios are to dense's times.

    Attributes:
        keeps: which tokens it keeps, in words.
        bytes_held: bytes of the cache at the end of the prompt.
        bytes_kept: the part of them that is keys and values of tokens.
        keys_kept: tokens that a KV head holds at the end of the prompt, as a mean over prompts, layers and heads. If
            each query head has its own set ("as published"), it is the mean over these. None in older files.
        kept_share: `bytes_kept` as a share of dense's.
        prefill_seconds: time to read a prompt, the median over prompts.
        decode_ms: time of a token after it, in the same way.
    """

    memory: str
    budget: Number
    label: str
    keeps: str | None = None
    prompts: int | None = None
    documents: int | None = None
    tokens: Number
    nll: Number
    ppl: Number = None
    stderr: Number = None
    difference: Number
    low: Number
    high: Number
    stderr_difference: Number = None
    answer: str | None
    speaks_of: str | None = None
    bytes_held: Number
    bytes_kept: Number
    keys_kept: Number = None
    kept_share: Number = None
    prefill_seconds: Number = None
    decode_ms: Number = None
    prefill_ratio: Number
    decode_ratio: Number


def keys_of(keys_kept: float | None) -> str:
    """`MemoryRow.keys_kept` in words: a whole number, or a mean with one decimal place if heads differ."""
    if keys_kept is None:
        return "–"
    return f"{keys_kept:,.0f}" if keys_kept % 1 == 0 else f"{keys_kept:,.1f}"


@dataclass(frozen=True, kw_only=True)
class KindShare:
    """The share of the tokens of a kind that a NAMM keeps."""

    kind: str
    tokens: int
    kept_share: Number


@dataclass(frozen=True, kw_only=True)
class AgeShare:
    """The share of the tokens that a NAMM keeps among those with `start` or more tokens after them."""

    start: int = named("from")
    tokens: int
    kept_share: Number


@dataclass(frozen=True, kw_only=True)
class Forgets:
    """Which tokens a NAMM keeps at the end of its prompts; `heads`: the share that each KV head keeps, by layer."""

    prompts: int
    kinds: list[KindShare]
    ages: list[AgeShare]
    heads: list[list[Number]]


@dataclass(frozen=True, kw_only=True)
class MemoriesResult(Result):
    """One model; a row for each memory at each budget, dense first.

    Attributes:
        prompt: tokens of a prompt.
        after: tokens after it that are scored.
        artefact: the name of the evolved network of namm.
    """

    COMMAND: ClassVar[str] = "memories"

    model: str
    sink_ids: list[int] = field(default_factory=list)
    prompt: int
    after: int = named("continue")
    sinks: int | None = None
    window: int | None = None
    positions: str | None = None
    layer: int | None = None
    artefact: str | None = None
    margin: float
    level: float
    seed: int | None = None
    these_texts: bool | None = None
    dtype: str | None = None
    device: str | None = None
    texts: list[Text]
    rows: list[MemoryRow]
    forgets: Forgets | None = omitted()
