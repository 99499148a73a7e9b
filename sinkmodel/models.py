"""The models: transformers' own GPT-NeoX and Llama, built from a shape and initialised as Pythia was."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PretrainedConfig, PreTrainedModel

from sinkmodel.errors import UserError

# Weights that write into the residual stream; their initial std falls with depth.
RESIDUAL_OUTPUTS = (
    "attention.dense.weight",
    "mlp.dense_4h_to_h.weight",
    "self_attn.o_proj.weight",
    "mlp.down_proj.weight",
)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder. The defaults are Pythia-160M's (EleutherAI/pythia, models/160M/pythia-160m.yml).

    Args:
        architecture: `gpt_neox` (parallel residual, LayerNorm, biases) or `llama` (RMSNorm, SwiGLU, no biases).
        kv_heads: heads that hold keys and values; fewer than `heads` only for `llama`.
        ffn: width of the feed-forward layer.
        positions: longest sequence that the model is trained on, in tokens, sinks included.
        rotary_pct: share of each head's dimensions that is rotated; below 1 only for `gpt_neox`.
        vocabulary: rows of the embedding; null takes what the data's tokenizer needs, rounded up to 128.
    """

    architecture: str = "gpt_neox"
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    kv_heads: int = 12
    ffn: int = 3072
    positions: int = 2048
    rotary_pct: float = 0.25
    rope_theta: float = 10000.0
    tie_embeddings: bool = False
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        if self.architecture not in ("gpt_neox", "llama"):
            raise UserError(f"model.architecture is {self.architecture!r}; choose gpt_neox or llama")
        for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "positions"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden % self.heads:
            raise UserError(f"model.hidden is {self.hidden}, which model.heads = {self.heads} does not divide")
        if self.heads % self.kv_heads:
            raise UserError(f"model.heads is {self.heads}, which model.kv_heads = {self.kv_heads} does not divide")
        if self.architecture == "gpt_neox" and self.kv_heads != self.heads:
            raise UserError("model.kv_heads must equal model.heads for gpt_neox, which has no grouped heads")
        if self.architecture == "llama" and self.rotary_pct != 1:
            raise UserError("model.rotary_pct must be 1 for llama, which rotates whole heads")


def transformers_config(shape: ModelShape, vocabulary: int) -> PretrainedConfig:
    """The transformers config of this shape with `vocabulary` embedding rows."""
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
    if shape.architecture == "llama":
        return LlamaConfig(
            **common,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.hidden // shape.heads,
            rms_norm_eps=1e-5,
            rope_parameters=rope,
        )
    return GPTNeoXConfig(
        **common,
        layer_norm_eps=1e-5,
        hidden_act="gelu",
        hidden_dropout=0.0,
        use_parallel_residual=True,
        rope_parameters={**rope, "partial_rotary_factor": shape.rotary_pct},
    )


def build_model(shape: ModelShape, vocabulary: int, seed: int) -> PreTrainedModel:
    """A model in fp32 on the CPU, its weights a function of shape, vocabulary and seed alone: twins start equal."""
    model = AutoModelForCausalLM.from_config(transformers_config(shape, vocabulary), attn_implementation="sdpa")
    initialise(model, seed)
    return model


@torch.no_grad()
def initialise(model: PreTrainedModel, seed: int) -> None:
    """Pythia's initialisation, in the order of `named_parameters`.

    Matrices are normal with std √(2/(5·hidden)) (gpt-neox `small_init`), those that write into the residual stream
    with std 2/layers/√hidden (`wang_init`); biases are 0, norms 1 (gpt-neox, megatron/model/init_functions.py).
    """
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            std = 2 / layers / math.sqrt(hidden) if name.endswith(RESIDUAL_OUTPUTS) else math.sqrt(2 / (5 * hidden))
            parameter.normal_(0.0, std, generator=generator)


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """All parameters, and those that are not embeddings (input, and output unless tied)."""
    total = sum(parameter.numel() for parameter in model.parameters())
    tables = {id(layer.weight): layer.weight.numel() for layer in (model.get_input_embeddings(), head_of(model))}
    return total, total - sum(tables.values())


def head_of(model: PreTrainedModel) -> torch.nn.Linear:
    """The output projection, hidden -> vocabulary."""
    return model.get_output_embeddings()
