"""GPT-NeoX and Llama with a sink in their softmax: transformers' own classes, one parameter a layer more, or none.

A folder of such a model has a model type of its own, `sink_gpt_neox` or `sink_llama`. `import sinkmodel.architectures`
makes transformers' Auto classes know it; without, they refuse it by name. Its config.json has the sizes one level down,
and a sentence where the hidden size should be: a plain `GPTNeoXForCausalLM.from_pretrained`, which would only warn of
the model type and then compute a softmax that lacks its sink, ends with that sentence (in transformers 4 with an error
that is less clear).
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from sinkmodel.attention import CAUSAL
from sinkmodel.errors import UserError
from sinkmodel.sinks import IN_SOFTMAX, SINK_ATTENTION, kind_of

FIELDS = "decoder"  # where config.json has what a plain loader would look for
WARNING = "this model has a sink in its softmax: import sinkmodel.architectures, then use AutoModelForCausalLM"
PARAMETER = "sink"  # its name in an attention module
# Those that know of the sink.
ATTENTIONS = (SINK_ATTENTION, CAUSAL, "sinkmodel_banded", "sinkmodel_watched", "sinkmodel_observed")


class _SinkInConfig:
    """Of a config: one level more in config.json, and no attention function that does not know of the sink."""

    @property
    def _attn_implementation(self) -> str:
        """What every layer asks. Whatever transformers has put there by itself means the one that has the sink."""
        name = self._attn_implementation_internal
        return name if name in ATTENTIONS else SINK_ATTENTION

    @_attn_implementation.setter
    def _attn_implementation(self, name: Any) -> None:
        self._attn_implementation_internal = with_sink(name)

    def to_json_string(self, use_diff: bool = True) -> str:
        fields = json.loads(super().to_json_string(use_diff))  # type: ignore[misc]
        front = {name: fields.pop(name) for name in ("architectures", "model_type", "sink") if name in fields}
        return json.dumps({**front, "hidden_size": WARNING, FIELDS: fields}, indent=2) + "\n"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        fields = dict(config_dict)
        inner = fields.pop(FIELDS, {})
        return super().from_dict({**fields, **inner}, **kwargs)  # type: ignore[misc]


class SinkGPTNeoXConfig(_SinkInConfig, GPTNeoXConfig):
    model_type = "sink_gpt_neox"


class SinkLlamaConfig(_SinkInConfig, LlamaConfig):
    model_type = "sink_llama"


class _SinkInSoftmax:
    """Of a model: `attention.sink` in every layer.

    `logit` [H] and `kv_bias` [G, D] start as zeros, so that all three kinds start as the same function. It is never
    decayed (`recipes.training.optimizer`).
    """

    def __init__(self, config: Any):
        kind = kind_of(config)
        if kind not in IN_SOFTMAX:
            raise UserError(f"a {config.model_type} model has a sink of kind {', '.join(IN_SOFTMAX)}, not {kind!r}")
        super().__init__(config)  # type: ignore[call-arg]
        for module in attentions_of(self):
            shape = sink_shape(config)
            if shape is not None:
                setattr(module, PARAMETER, nn.Parameter(torch.zeros(shape)))

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(with_sink(attn_implementation), *args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        sink = getattr(module, PARAMETER, None)
        if isinstance(sink, nn.Parameter):
            nn.init.zeros_(sink)


class SinkGPTNeoXForCausalLM(_SinkInSoftmax, GPTNeoXForCausalLM):
    config_class = SinkGPTNeoXConfig


class SinkLlamaForCausalLM(_SinkInSoftmax, LlamaForCausalLM):
    config_class = SinkLlamaConfig


def with_sink(name: Any) -> str:
    """`sdpa` and `eager`, which transformers chooses by itself, mean the one with the sink; UserError for others."""
    if name not in (None, "sdpa", "eager", *ATTENTIONS):
        raise UserError(f"attn_implementation {name!r} would drop the sink in the softmax; leave it out")
    return name if name in ATTENTIONS else SINK_ATTENTION


def attentions_of(model: Any) -> list[nn.Module]:
    """The attention module of each layer."""
    return [layer.attention if hasattr(layer, "attention") else layer.self_attn for layer in model.base_model.layers]


def sink_shape(config: Any) -> tuple[int, ...] | None:
    """[H] of a `logit`, [G, D] of a `kv_bias`; None where nothing is learned."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {"logit": (heads,), "kv_bias": (groups, size)}.get(kind_of(config))


for config_class, model_class in (
    (SinkGPTNeoXConfig, SinkGPTNeoXForCausalLM),
    (SinkLlamaConfig, SinkLlamaForCausalLM),
):
    AutoConfig.register(config_class.model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)
