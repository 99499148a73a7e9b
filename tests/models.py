"""Random tiny models of several families, with weights large enough that attention is far from uniform."""

from __future__ import annotations

import functools

import torch
import transformers

from sinkmodel import architectures

VOCABULARY = 61
POSITIONS = 64
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def scaled(kind: str, **settings) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **settings}}


FAMILIES = {  # what chunked scoring reads
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.25}),
    "gpt_neox-serial": ("GPTNeoX", {"rotary_pct": 0.5, "use_parallel_residual": False}),
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "llama-yarn": ("Llama", scaled("yarn", factor=4.0)),
    "qwen3": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 12}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": POSITIONS}),
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
STREAMED = {  # what the streaming cache runs
    **FAMILIES,
    "llama-linear": ("Llama", {"num_key_value_heads": 2, **scaled("linear", factor=4.0)}),
    "llama-dynamic": ("Llama", {"num_key_value_heads": 2, **scaled("dynamic", factor=2.0)}),
    "llama-llama3": ("Llama", {"num_key_value_heads": 2, **scaled("llama3", **LLAMA3)}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "gemma": ("Gemma", {"num_key_value_heads": 1, "head_dim": 12}),
    "phi": ("Phi", {}),
    "gptj": ("GPTJ", {"rotary_dim": 4}),
    "falcon": ("Falcon", {"ffn_hidden_size": 48}),
    "falcon-new": ("Falcon", {"ffn_hidden_size": 48, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "olmo": ("Olmo", {"num_key_value_heads": 2}),
    "smollm3": ("SmolLM3", {"num_key_value_heads": 2, "num_hidden_layers": 4}),  # its fourth layer has no RoPE
    "stablelm": ("StableLm", {"num_key_value_heads": 2, "partial_rotary_factor": 0.5}),
    "cohere": ("Cohere", {"num_key_value_heads": 2, "logit_scale": 1.0}),
    "mpt": ("Mpt", {"max_seq_len": POSITIONS, "use_cache": True}),
}
IN_SOFTMAX = {  # ours: a sink in the softmax
    f"{name}-{kind}": (f"Sink{settings[0]}", {**settings[1], "sink": {"kind": kind}})
    for name, settings in FAMILIES.items()
    if name in ("gpt_neox", "llama")
    for kind in ("zero", "logit", "kv_bias")
}
CLASSES = {
    "GPT2": "GPT2LMHeadModel",
    "Bert": "BertLMHeadModel",
    "Llama4Text": "Llama4ForCausalLM",
    "Gemma3Text": "Gemma3ForCausalLM",
}


def build(family: str, **changes):
    """A new model, in eval mode; `family` is a key of a table above or the name of a transformers family (`Gemma2`)."""
    name, settings = {**STREAMED, **IN_SOFTMAX}.get(family, (family, {}))
    library = architectures if family in IN_SOFTMAX else transformers
    settings = {**SMALL, **settings, **changes}
    if transformers.__version__.startswith("4.") and "rope_parameters" in settings:
        settings["rope_scaling"] = settings.pop("rope_parameters")
    config = getattr(library, f"{name}Config")(**settings)
    torch.manual_seed(5)
    model = getattr(library, CLASSES.get(name, f"{name}ForCausalLM"))(config).eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            if place.endswith(".sink"):  # as large as other scores and keys, and of either sign
                parameter += torch.randn(parameter.shape, generator=generator)
            elif parameter.ndim == 1:  # biases and norms, which start idle
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    # A stream ends when its caller says so, and `generate` shall not take a word of the text for padding.
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def cast(model, dtype: torch.dtype):
    """The model with weights in `dtype`, as `from_pretrained(dtype=…)` gives it: RoPE's frequencies stay in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


_built_once = functools.lru_cache(build)
_in_use = []  # by the running test: (model, its state when it was handed out)


def _state(model) -> list:
    return [model.training, *((x.dtype, x.data_ptr(), x._version) for x in model.parameters())]


def model_of(family: str, **changes):
    """The model of `build`, made once, for tests that leave its weights alone; conftest.py checks that they do."""
    model = _built_once(family, **changes)
    _in_use.append((model, _state(model)))
    return model


def check_shared_models() -> None:
    """Fail if the test changed a model that later tests use too; they get a new one."""
    changed = [type(model).__name__ for model, state in _in_use if _state(model) != state]
    _in_use.clear()
    if changed:
        _built_once.cache_clear()
    assert not changed, f"the test changed the weights of a shared model, {', '.join(changed)}: use `build` instead"


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
