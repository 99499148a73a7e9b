"""Which models can be streamed, judged by their config alone. Others are refused by name, before the model is run.

A config shows whether positions are learned, whether layers keep a state, and how wide the model's own window is.
How keys are rotated is found by running the model (`sinkmodel.probe`).
"""

from __future__ import annotations

from typing import Any

from sinkmodel.errors import UserError
from sinkmodel.sinks import kind_of

ABSOLUTE = (
    *("biogpt", "codegen2", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "imagegpt", "openai-gpt", "opt", "transfo-xl"),
    *("xglm", "xlnet"),
)  # learned or sinusoidal embeddings of the position, added once; a key cannot be moved
POSITION_FREE = ("decision_transformer",)  # each token's embedding contains its time; attention has no positions
OTHER_ALIBI = ("bloom",)  # also Falcon with alibi=True: the bias is built from a 2-D mask of the whole text
RECURRENT = (
    *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "mamba", "mamba2", "minimax"),
    *("nemotron_h", "qwen3_5", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "olmo_hybrid"),
)  # these have layers that keep a state instead of keys


def check_config(config: Any, slots: int, text: bool) -> None:
    """Raise UserError if the (text) config alone shows that the model cannot be streamed.

    Args:
        slots: number of keys that the stream holds.
        text: whether keys keep their positions in the text.
    """
    kind = config.model_type
    layers = set(getattr(config, "layer_types", None) or ())
    if kind in RECURRENT or layers - {"full_attention", "sliding_attention"}:
        other = ", ".join(sorted(layers - {"full_attention", "sliding_attention"})) or "recurrent"
        raise UserError(f"model type {kind!r} has {other} layers, which keep no keys that a stream could drop")
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model type {kind!r} has an encoder; only decoders can be streamed")
    if kind in ABSOLUTE:
        raise UserError(f"model type {kind!r} adds absolute positions to its tokens, so cached keys cannot be moved")
    if kind in OTHER_ALIBI or (kind == "falcon" and getattr(config, "alibi", False)):
        raise UserError(f"model type {kind!r} with ALiBi cannot be streamed; of the models with ALiBi only MPT can")
    if "llama_4_scaling_beta" in (getattr(config, "rope_parameters", None) or {}):
        raise UserError(f"model type {kind!r} scales its queries by their place in the text; that is not supported")
    native = own_window(config)
    if native is not None and native < slots:
        raise UserError(
            f"model type {kind!r} has its own window of {native} keys, smaller than the {slots} keys of the stream; "
            f"choose a budget of at most {native}"
        )
    if kind == "mpt":
        if not config.attn_config.alibi:
            raise UserError("model type 'mpt' without ALiBi has learned positions, so cached keys cannot be moved")
        if text:
            raise UserError("model type 'mpt' places its keys by their index (ALiBi); use positions=\"cache\"")
        if slots > config.max_seq_len:
            raise UserError(
                f"the stream holds {slots} keys and model type 'mpt' has ALiBi for {config.max_seq_len}; "
                f"choose a budget of at most {config.max_seq_len}"
            )


def own_window(config: Any) -> int | None:
    """The smallest window of any layer, in keys, according to a (text) config; None if all layers see everything."""
    layers = getattr(config, "layer_types", None) or ("sliding_attention", "chunked_attention")
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    chunked = getattr(config, "attention_chunk_size", None)
    windows = (("sliding_attention", sliding), ("chunked_attention", chunked))
    return min((keys for layer, keys in windows if layer in layers and keys is not None), default=None)


def signature(config: Any) -> dict[str, Any]:
    """The fields that must be equal in two configs if the model of one is to continue a stream of the other."""
    heads = getattr(config, "num_attention_heads", None)
    return {
        "model_type": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None),
        "vocabulary": config.vocab_size,
        "rope": repr(getattr(config, "rope_parameters", None)),
        "sink": kind_of(config),
    }
