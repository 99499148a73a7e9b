"""Build models: transformers' own GPT-NeoX and Llama in a given shape, initialised as Pythia was."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PretrainedConfig, PreTrainedModel

from sinkmodel.shapes import ModelShape
from sinkmodel.sinks import IN_SOFTMAX, SinkConfig, write_sink
from sinkmodel.softmax_sinks.architectures import PARAMETER as SINK_PARAMETER
from sinkmodel.softmax_sinks.architectures import SinkGPTNeoXConfig, SinkLlamaConfig

# Weights that write into the residual stream. Their initial std decreases with depth.
RESIDUAL_OUTPUTS = (
    "attention.dense.weight",
    "mlp.dense_4h_to_h.weight",
    "self_attn.o_proj.weight",
    "mlp.down_proj.weight",
)


def transformers_config(shape: ModelShape, vocabulary: int, sink: SinkConfig | None = None) -> PretrainedConfig:
    """The transformers config of this shape with `vocabulary` embedding rows. For a sink in the softmax, our class."""
    in_softmax = sink is not None and sink.kind in IN_SOFTMAX
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.positions,
        "tie_word_embeddings": shape.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    config: PretrainedConfig
    if shape.architecture == "llama":
        config = (SinkLlamaConfig if in_softmax else LlamaConfig)(
            **common,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.hidden // shape.heads,
            rms_norm_eps=1e-5,
            rope_parameters=rope,
        )
    else:
        config = (SinkGPTNeoXConfig if in_softmax else GPTNeoXConfig)(
            **common,
            layer_norm_eps=1e-5,
            hidden_act="gelu",
            hidden_dropout=0.0,
            use_parallel_residual=True,
            rope_parameters={**rope, "partial_rotary_factor": shape.rotary_pct},
        )
    if sink is not None and in_softmax:
        write_sink(config, sink, [])
    return config


def build_model(shape: ModelShape, vocabulary: int, seed: int, sink: SinkConfig | None = None) -> PreTrainedModel:
    """A model in fp32 on the CPU. Its weights depend only on shape, vocabulary and seed, so twins start equal.

    A sink that is a token is part of the vocabulary. With a sink in the softmax, the model is one of
    `sinkmodel.architectures`.
    """
    config = transformers_config(shape, vocabulary, sink)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    initialise(model, seed)
    return model


@torch.no_grad()
def initialise(model: PreTrainedModel, seed: int) -> None:
    """Pythia's initialisation, in the order of `named_parameters`.

    Matrices are normal with std √(2/(5·hidden)) (gpt-neox `small_init`). Those that write into the residual stream have
    std 2/layers/√hidden (`wang_init`). Biases are 0, norms 1 (gpt-neox, megatron/model/init_functions.py).
    """
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(f".{SINK_PARAMETER}"):
            parameter.zero_()  # uses no random number, so that the other weights equal those of the twins
        elif parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            std = 2 / layers / math.sqrt(hidden) if name.endswith(RESIDUAL_OUTPUTS) else math.sqrt(2 / (5 * hidden))
            parameter.normal_(0.0, std, generator=generator)


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """The number of all parameters, and of those outside the embeddings (input, and output unless tied)."""
    total = sum(parameter.numel() for parameter in model.parameters())
    tables = {id(layer.weight): layer.weight.numel() for layer in (model.get_input_embeddings(), head_of(model))}
    return total, total - sum(tables.values())


def head_of(model: PreTrainedModel) -> torch.nn.Linear:
    """The output projection, hidden -> vocabulary."""
    return model.get_output_embeddings()
