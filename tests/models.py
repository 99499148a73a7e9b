"""Random tiny models of several families, with weights large enough that attention is far from uniform."""

from __future__ import annotations

import functools

import torch
import transformers

VOCABULARY = 61
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FAMILIES = {
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.25}),
    "gpt_neox-serial": ("GPTNeoX", {"rotary_pct": 0.5, "use_parallel_residual": False}),
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "llama-yarn": ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 12}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 64}),
}


def build(family: str, **changes):
    """A new model, in eval mode; `family` is a key of FAMILIES or the name of a transformers family (`Gemma2`)."""
    name, settings = FAMILIES.get(family, (family, {}))
    settings = {**SMALL, **settings, **changes}
    if transformers.__version__.startswith("4.") and "rope_parameters" in settings:
        settings["rope_scaling"] = settings.pop("rope_parameters")
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(5)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms, which start idle
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


model_of = functools.lru_cache(build)  # for tests that leave the model alone


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
