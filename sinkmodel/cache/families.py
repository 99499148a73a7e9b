"""Which models can be streamed: refused by name from the config, or after a trial on the model itself.

A config tells of learned positions, of state-space layers and of native windows; how keys are turned is found out by
running the model on a few tokens (`sinkmodel.rope`). Both happen before the first token of a stream.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sinkmodel.cache.saved import SAMPLE
from sinkmodel.errors import UserError
from sinkmodel.rope import Rotary, frequencies, rotary_of, trial_keys
from sinkmodel.sinks import kind_of

ABSOLUTE = (
    *("biogpt", "codegen2", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "imagegpt", "openai-gpt", "opt", "transfo-xl"),
    *("xglm", "xlnet"),
)  # learned or sinusoidal embeddings of the place in the text, added once; a key cannot be moved
OTHER_ALIBI = ("bloom",)  # and Falcon with alibi=True: their bias is built from a 2-D mask of the whole text
RECURRENT = (
    *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "mamba", "mamba2", "minimax"),
    *("nemotron_h", "qwen3_5", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "olmo_hybrid"),
)  # layers that keep a state, not keys


def check_config(config: Any, slots: int, text: bool) -> None:
    """UserError for what the (text) config alone tells: `slots` keys of this model cannot be a stream."""
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
            f"model type {kind!r} has a window of {native} of its own, smaller than the {slots} keys of the stream; "
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
    """The most keys that a query sees in some layers, where a (text) config says that these do not see all."""
    layers = getattr(config, "layer_types", None) or ("sliding_attention", "chunked_attention")
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    chunked = getattr(config, "attention_chunk_size", None)
    windows = (("sliding_attention", sliding), ("chunked_attention", chunked))
    return min((keys for layer, keys in windows if layer in layers and keys is not None), default=None)


@dataclass(frozen=True)
class Traits:
    """What a trial run of a model showed."""

    rotary: Rotary | None  # None: ALiBi
    groups: int  # G, KV heads
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device
    vocabulary: int  # rows of the embedding
    accepts: frozenset[str]  # names of the forward's arguments

    def reach(self, slots: int) -> int:
        """Positions that the model is given stay below this number.

        Small, since fp32 RoPE loses what its positions grow; twice the slots, so that no key is turned a second time,
        and turning the window now and then costs one key a token.
        """
        limit = self.rotary.limit if self.rotary is not None else None
        return 2 * slots if limit is None else min(2 * slots, limit)


_SEEN: weakref.WeakKeyDictionary[Any, dict[Any, Traits]] = weakref.WeakKeyDictionary()


def traits_of(model: Any, run: Callable[..., Any], slots: int) -> Traits:
    """The traits of a model; UserError, by name, where it cannot be streamed.

    A model is tried once, as long as it stays as it is. `run` is its forward.
    """
    device, rows = next(model.parameters()).device, model.get_input_embeddings().num_embeddings
    inv_freq, limit = (torch.empty(0), None) if model.config.model_type == "mpt" else frequencies(model)
    autocast = torch.is_autocast_enabled(device.type)
    key = (model.dtype, device, autocast, rows, limit, tuple(inv_freq.tolist()))
    traits = _SEEN.setdefault(model, {})
    if key not in traits:
        traits[key] = _try(model, run)
    found = traits[key]
    if limit is not None and slots > limit:
        raise UserError(
            f"model type {model.config.model_type!r} has positions of one kind only up to {limit}, and the stream "
            f"holds {slots} keys; choose a budget of at most {limit}"
        )
    return found


def _try(model: Any, run: Callable[..., Any]) -> Traits:
    kind = model.config.model_type
    accepts = frozenset(inspect.signature(run).parameters)
    lacking = {"past_key_values", "attention_mask", *(() if kind == "mpt" else ("position_ids",))} - accepts
    if lacking:
        raise UserError(f"the forward of {type(model).__name__} does not name {', '.join(sorted(lacking))}; let it")
    rotary = None if kind == "mpt" else rotary_of(model, run)
    layers = trial_keys(model, run, None if kind == "mpt" else 0)
    shapes = {(*layer.keys.shape[1::2], layer.values.shape[-1], layer.keys.device) for layer in layers}
    if len(shapes) > 1:
        raise UserError(f"model type {kind!r} has keys of several shapes or devices; one of each is supported")
    if len(layers) != model.config.get_text_config().num_hidden_layers:
        raise UserError(f"model type {kind!r} shares keys between layers; that is not supported")
    groups, key_size, value_size, device = shapes.pop()
    rows = model.get_input_embeddings().num_embeddings
    return Traits(rotary, groups, key_size, value_size, layers[0].keys.dtype, device, rows, accepts)


def signature(config: Any) -> dict[str, Any]:
    """What two configs must have in common for a stream of the one to go on with the other."""
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


def sample_of(model: Any) -> list[float]:
    """A few of the model's weights, by which a stream that was put aside knows it again: twins have one signature."""
    weights = model.get_input_embeddings().weight.detach().flatten()
    return weights[:: max(1, len(weights) // SAMPLE)][:SAMPLE].float().tolist()
