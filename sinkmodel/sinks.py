"""What absorbs attention: the kind and number of sinks, and where they stand in a saved config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sinkmodel.errors import UserError

IN_SOFTMAX = ("zero", "logit", "kv_bias")  # no token: one more column of every softmax, whose value is zero
SINK_ATTENTION = "sinkmodel_sink"  # attention of such a model (`sinkmodel.attention`), with the masks of `sdpa`
KINDS = ("none", "token", *IN_SOFTMAX)
RESERVED_ROWS = 16  # vocabulary rows kept free of text in every model, so that twins have the same shapes


@dataclass(frozen=True)
class SinkConfig:
    """What a model has for attention that has nowhere to go.

    Args:
        kind: `none`, a vanilla model; `token`, trainable tokens in front of every sample (StreamingLLM, section 3.3);
            `zero`, a key and a value of zeros, softmax-off-by-one (its "zero sink"); `logit`, one learned number a head
            in place of the key's score (gpt-oss); `kv_bias`, a learned key a layer and KV head, never rotated, its
            value zero (Gu et al., arXiv 2410.10781).
        count: how many tokens of the kind `token`; every other sink stands alone.
    """

    kind: str = "none"
    count: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"sink.kind is {self.kind!r}; choose one of {', '.join(KINDS)}")
        if not 1 <= self.count <= RESERVED_ROWS:
            raise UserError(f"sink.count is {self.count}; it must be between 1 and {RESERVED_ROWS}")
        if self.kind in IN_SOFTMAX and self.count != 1:
            raise UserError(f"sink.count is {self.count}, but a sink of kind {self.kind!r} stands alone; leave it out")

    @property
    def tokens(self) -> int:
        """How many tokens stand in front of the text."""
        return self.count if self.kind == "token" else 0

    @property
    def names(self) -> list[str]:
        """The sink tokens as text: `<|sink|>`, `<|sink2|>` …"""
        return [f"<|sink{i}|>" if i > 1 else "<|sink|>" for i in range(1, self.tokens + 1)]

    def ids(self, text_vocabulary: int) -> list[int]:
        """Sinks take the first ids behind the text vocabulary (GPT-NeoX: 50277 of 50304)."""
        return list(range(text_vocabulary, text_vocabulary + self.tokens))


def padded_vocabulary(text_vocabulary: int) -> int:
    """Rows of the embedding: text vocabulary and reserved rows, rounded up to 128 (GPT-NeoX: 50277 -> 50304)."""
    return -(-(text_vocabulary + RESERVED_ROWS) // 128) * 128


def kind_of(config: Any) -> str:
    """The kind of sink that a model's config tells of; "none" for a vanilla model or somebody else's."""
    return _record(config).get("kind", "none")


def sinks_to_keep(config: Any) -> int:
    """How many first tokens a stream of this model keeps for good: its own sinks, or 1; 0 with one in the softmax."""
    return 0 if kind_of(config) in IN_SOFTMAX else len(sink_ids_of(config)) or 1


def write_sink(config: Any, sink: SinkConfig, token_ids: list[int]) -> None:
    """Record the sink in a transformers config; every loader ignores the key, ours reads it."""
    config.sink = {"kind": sink.kind, "count": sink.tokens, "token_ids": list(token_ids)}


def sink_ids_of(config: Any) -> list[int]:
    """The ids that stand in front of every text of this model; empty for a vanilla model or somebody else's."""
    return list(_record(config).get("token_ids", []))


def front_of(config: Any, tokenizer: Any = None) -> list[int]:
    """The ids that stand in front of every text: the model's own sinks, or what a stranger's tokenizer puts there.

    That is `<s>` of Llama, and nothing of GPT-2 and Pythia. A model that has always seen it has its sink there; without
    it the first word of a text would be taken for the sink.
    """
    if is_ours(config) or tokenizer is None:
        return sink_ids_of(config)
    whole, plain = (tokenizer("a", add_special_tokens=added, verbose=False).input_ids for added in (True, False))
    starts = range(len(whole) - len(plain) + 1)
    return list(whole[: next((start for start in starts if whole[start : start + len(plain)] == plain), 0)])


def is_ours(config: Any) -> bool:
    """Whether the model comes from this recipe, which records a sink of kind "none" as well."""
    return bool(_record(config))


def check_record(config: Any) -> None:
    """UserError where a config tells of a sink that is none of ours: a file from a stranger, or a damaged one."""
    kind, ids = kind_of(config), _record(config).get("token_ids", [])
    if kind not in KINDS:
        raise UserError(f"the config has a sink of kind {kind!r}; known are {', '.join(KINDS)}, so export it again")
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids) or (kind == "token") != bool(ids):
        raise UserError(f"the config has a sink of kind {kind!r} with the token ids {ids!r}; export the model again")


def _record(config: Any) -> dict[str, Any]:
    record = getattr(config, "sink", None)
    return record if isinstance(record, dict) else {}
