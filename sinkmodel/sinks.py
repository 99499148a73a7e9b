"""What absorbs attention: the kind and number of sinks, and how a saved config records them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sinkmodel.checks import check_bounds, choices_of, one_of
from sinkmodel.errors import UserError

IN_SOFTMAX = ("zero", "logit", "kv_bias")  # not tokens: one more column of every softmax, with value zero
SINK_ATTENTION = "sinkmodel_sink"  # the attention of such a model (`sinkmodel.softmax_sinks`), with the masks of `sdpa`
Kind = Literal["none", "token", "zero", "logit", "kv_bias"]
KINDS = choices_of(Kind)
RESERVED_ROWS = 16  # vocabulary rows that no text token uses, in every model, so that twins have the same shapes


@dataclass(frozen=True)
class SinkConfig:
    """The attention sink of a model.

    Args:
        kind: `none`, a vanilla model; `token`, trainable tokens in front of every sample (StreamingLLM, section 3.3);
            `zero`, a key and a value of zeros, softmax-off-by-one (its "zero sink"); `logit`, one learned number per
            head that takes the place of the key's score (gpt-oss); `kv_bias`, a learned key per layer and KV head,
            never rotated, with value zero (Gu et al., arXiv 2410.10781).
        count: number of sink tokens if the kind is `token`. It must be 1 for every other kind.
    """

    kind: Kind = "none"
    count: int = 1

    def __post_init__(self) -> None:
        one_of("sink.kind", self.kind, Kind)
        check_bounds("sink.count", self.count, least=1, most=RESERVED_ROWS)
        if self.kind in IN_SOFTMAX and self.count != 1:
            raise UserError(
                f"sink.count is {self.count}, but a model has only one sink of kind {self.kind!r}; leave sink.count out"
            )

    @property
    def tokens(self) -> int:
        """Number of sink tokens in front of the text."""
        return self.count if self.kind == "token" else 0

    @property
    def names(self) -> list[str]:
        """The sink tokens as text: `<|sink|>`, `<|sink2|>` …"""
        return [f"<|sink{i}|>" if i > 1 else "<|sink|>" for i in range(1, self.tokens + 1)]

    def ids(self, text_vocabulary: int) -> list[int]:
        """Token ids of the sinks: the first ids after the text vocabulary (GPT-NeoX: 50277 of 50304)."""
        return list(range(text_vocabulary, text_vocabulary + self.tokens))


def padded_vocabulary(text_vocabulary: int) -> int:
    """Rows of the embedding: text vocabulary plus reserved rows, rounded up to 128 (GPT-NeoX: 50277 -> 50304)."""
    return -(-(text_vocabulary + RESERVED_ROWS) // 128) * 128


def kind_of(config: Any) -> Kind:
    """The kind of sink that a model's config records; "none" for a vanilla model or a third-party model."""
    return _record(config).get("kind", "none")


def sinks_to_keep(config: Any) -> int:
    """How many leading tokens a stream never evicts: the model's own sinks, else 1; 0 if the softmax has a sink."""
    return 0 if kind_of(config) in IN_SOFTMAX else len(sink_ids_of(config)) or 1


def write_sink(config: Any, sink: SinkConfig, token_ids: list[int]) -> None:
    """Record the sink in a transformers config. Other loaders ignore the key; ours reads it."""
    config.sink = {"kind": sink.kind, "count": sink.tokens, "token_ids": list(token_ids)}


def sink_ids_of(config: Any) -> list[int]:
    """The sink ids in front of every text of this model; empty for a vanilla or third-party model."""
    return list(_record(config).get("token_ids", []))


def front_of(config: Any, tokenizer: Any = None) -> list[int]:
    """The ids in front of every text: the model's own sinks, or the tokens that a third-party tokenizer prepends.

    Llama's tokenizer prepends `<s>`; those of GPT-2 and Pythia prepend nothing. A model that was trained with such a
    token uses it as its sink. Without the token, the first word of a text would become the sink.
    """
    if is_ours(config) or tokenizer is None:
        return sink_ids_of(config)
    whole, plain = (tokenizer("a", add_special_tokens=added, verbose=False).input_ids for added in (True, False))
    starts = range(len(whole) - len(plain) + 1)
    return list(whole[: next((start for start in starts if whole[start : start + len(plain)] == plain), 0)])


def is_ours(config: Any) -> bool:
    """Whether this recipe trained the model. It also records a sink of kind "none"."""
    return bool(_record(config))


def check_record(config: Any) -> None:
    """Raise UserError if a config records a sink that we do not know: an untrusted or damaged file."""
    kind, ids = kind_of(config), _record(config).get("token_ids", [])
    if kind not in KINDS:
        raise UserError(f"the config has a sink of kind {kind!r}; known are {', '.join(KINDS)}, so export it again")
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids) or (kind == "token") != bool(ids):
        raise UserError(f"the config has a sink of kind {kind!r} with the token ids {ids!r}; export the model again")


def _record(config: Any) -> dict[str, Any]:
    record = getattr(config, "sink", None)
    return record if isinstance(record, dict) else {}
