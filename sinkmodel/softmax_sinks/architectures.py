"""GPT-NeoX and Llama with a sink in their softmax: transformers' own classes, at most one parameter more per layer.

The folder of such a model has its own model type, `sink_gpt_neox` or `sink_llama`. `import sinkmodel.architectures`
registers these with transformers' Auto classes; without it, they refuse the folder by name. A plain
`GPTNeoXForCausalLM.from_pretrained` would only warn about the model type and then compute a softmax without the sink.
Therefore config.json has the sizes one level down, and a sentence in place of the hidden size: plain classes fail with
that sentence (in transformers 4 with a less clear error).
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

FIELDS = "decoder"  # the key of config.json that holds what a plain loader expects at the top level
WARNING = "this model has a sink in its softmax: import sinkmodel.architectures, then use AutoModelForCausalLM"
PARAMETER = "sink"  # the parameter's name in an attention module
# The attention functions that include the sink.
ATTENTIONS = (SINK_ATTENTION, CAUSAL, "sinkmodel_banded", "sinkmodel_watched", "sinkmodel_observed")


class _SinkInConfig:
    """Mixin of a config: one more level in config.json, and only attention functions that include the sink."""

    @property
    def _attn_implementation(self) -> str:
        """Read by every layer. A name that transformers chose by default is replaced by the one with the sink."""
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
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        fields = dict(config_dict)
        inner = fields.pop(FIELDS, {})
        return super().from_dict({**fields, **inner}, **kwargs)  # type: ignore[misc]


class SinkGPTNeoXConfig(_SinkInConfig, GPTNeoXConfig):
    model_type = "sink_gpt_neox"


class SinkLlamaConfig(_SinkInConfig, LlamaConfig):
    model_type = "sink_llama"


class _SinkInSoftmax:
    """Mixin of a model: adds `attention.sink` to every layer.

    `logit` [H] and `kv_bias` [G, D] start as zeros, so that all three kinds compute the same output at first. The
    optimiser never decays them (`recipes.training.optimizer`).
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
    """Map `sdpa` and `eager`, transformers' defaults, to the attention with the sink; UserError for other names."""
    if name not in (None, "sdpa", "eager", *ATTENTIONS):
        raise UserError(f"attn_implementation {name!r} would drop the sink in the softmax; leave it out")
    return name if name in ATTENTIONS else SINK_ATTENTION


def attentions_of(model: Any) -> list[nn.Module]:
    """The attention module of each layer."""
    return [layer.attention if hasattr(layer, "attention") else layer.self_attn for layer in model.base_model.layers]


def sink_shape(config: Any) -> tuple[int, ...] | None:
    """[H] for a `logit`, [G, D] for a `kv_bias`; None if the sink has no parameter."""
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
