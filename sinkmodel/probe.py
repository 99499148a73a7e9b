"""Learn about a model by running it on a few tokens: how it rotates its keys, and what its cache holds.

    rotary = rotary_of(model)            # refuses, by name, a model whose keys cannot be turned
    traits = traits_of(model, model, 64)

The rotary layout of a model, and its layers without one (SmolLM3), are found by trial, not from a list of names. The
model runs twice on the same few tokens, at two offsets: the keys of the first run, turned, must equal those of the
second.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkmodel.errors import UserError, not_finite
from sinkmodel.model_support import POSITION_FREE
from sinkmodel.rope import Rotary
from sinkmodel.sinks import kind_of

STATIC_TYPES = ("default", "linear", "llama3", "yarn")  # the same frequencies at all lengths
BOUNDED_TYPES = ("dynamic", "longrope")  # the same frequencies only up to the original length
UNTURNED = ("mpt", *POSITION_FREE)  # model types whose keys are not turned by position
PROBE_TOKENS, PROBE_SHIFT = 8, 37
SAMPLE = 16  # number of weights by which a stream recognises its model


@dataclass(frozen=True)
class Traits:
    """Properties of a model that a trial run revealed."""

    rotary: Rotary | None  # None: ALiBi, or no positions at all
    groups: int  # G, KV heads
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device
    vocabulary: int  # rows of the embedding
    accepts: frozenset[str]  # argument names of the forward


_SEEN: weakref.WeakKeyDictionary[Any, dict[Any, Traits]] = weakref.WeakKeyDictionary()


def traits_of(model: Any, run: Callable[..., Any], slots: int) -> Traits:
    """The traits of a model. Raises UserError, by name, if it cannot be streamed.

    Args:
        model: a causal language model of transformers. The trial is repeated only if the model has changed.
        run: its forward.
        slots: number of keys that its stream will hold.
    """
    device, rows = next(model.parameters()).device, model.get_input_embeddings().num_embeddings
    unturned = model.config.model_type in UNTURNED
    inv_freq, limit = (torch.empty(0), None) if unturned else frequencies(model)
    autocast = torch.is_autocast_enabled(device.type)
    key = (model.dtype, device, autocast, rows, limit, tuple(inv_freq.tolist()))
    traits = _SEEN.setdefault(model, {})
    if key not in traits:
        traits[key] = _try(model, run)
    found = traits[key]
    if limit is not None and slots > limit:
        raise UserError(
            f"model type {model.config.model_type!r} keeps its rotary frequencies only up to {limit}, and the stream "
            f"holds {slots} keys; choose a budget of at most {limit}"
        )
    return found


def _try(model: Any, run: Callable[..., Any]) -> Traits:
    kind = model.config.model_type
    accepts = frozenset(inspect.signature(run).parameters)
    lacking = {"past_key_values", "attention_mask", *(() if kind == "mpt" else ("position_ids",))} - accepts
    if lacking:
        raise UserError(f"the forward of {type(model).__name__} has no argument {', '.join(sorted(lacking))}; add it")
    rotary = None if kind in UNTURNED else rotary_of(model, run)
    if kind in POSITION_FREE:
        _check_unmoved(model, run)
    layers = trial_keys(model, run, None if kind == "mpt" else 0)
    shapes = {(*layer.keys.shape[1::2], layer.values.shape[-1], layer.keys.device) for layer in layers}
    if len(shapes) > 1:
        raise UserError(f"model type {kind!r} has keys of several shapes or devices; one of each is supported")
    if len(layers) != model.config.get_text_config().num_hidden_layers:
        raise UserError(f"model type {kind!r} shares keys between layers; that is not supported")
    groups, key_size, value_size, device = shapes.pop()
    rows = model.get_input_embeddings().num_embeddings
    return Traits(rotary, groups, key_size, value_size, layers[0].keys.dtype, device, rows, accepts)


def _check_unmoved(model: Any, run: Callable[..., Any]) -> None:
    """UserError if the keys of a model that should know no positions depend on those that it is given."""
    near, far = ([layer.keys for layer in trial_keys(model, run, offset)] for offset in (0, 1))
    if any(_difference(key, moved) > 1e-6 for key, moved in zip(near, far)):
        raise UserError(
            f"model type {model.config.model_type!r} adds a position to its tokens here; give it position 0 for all of "
            "them, as transformers' own class does"
        )


def rotary_of(model: Any, run: Callable[..., Any] | None = None) -> Rotary:
    """The rotary layout of a transformers causal language model. Raises UserError if its keys cannot be turned.

    `run` is the model's forward, if that must not be called through the model itself; None: call the model.
    """
    run = run or model
    kind = model.config.model_type
    inv_freq, limit = frequencies(model)
    shift = max(1, min(PROBE_SHIFT, (limit or 2 * PROBE_SHIFT) - 1))
    near, far = ([layer.keys for layer in trial_keys(model, run, offset)] for offset in (0, shift))
    if not all(bool(torch.isfinite(key).all()) for key in near):
        raise not_finite(model, "keys")
    tolerance = 1e-3 if near[0].dtype == torch.float32 else 0.05  # a wrong layout differs by a third or more
    understood = 0  # number of layers, from the first on, that a layout explains
    for interleaved in (False, True):
        rotary = Rotary(inv_freq, interleaved, (), limit)
        layers: list[bool] = []
        for key, moved in zip(near, far):
            turned, unmoved = _difference(rotary.turn(key, shift), moved), _difference(key, moved)
            if not min(turned, unmoved) < tolerance:
                break
            layers.append(turned < unmoved)
        if len(layers) == len(near) and any(layers):
            return Rotary(inv_freq, interleaved, tuple(layers), limit)
        understood = max(understood, len(layers))
    if understood == len(near):
        raise UserError(f"model type {kind!r} does not turn its keys by position; streaming needs RoPE")
    raise UserError(
        f"model type {kind!r} rotates the keys of layer {understood} in a way that is not supported "
        "(half-split and interleaved RoPE over the first dimensions of a head are)"
    )


def _difference(x: Tensor, y: Tensor) -> float:
    return ((x.float() - y.float()).norm() / y.float().norm()).item()


def frequencies(model: Any) -> tuple[Tensor, int | None]:
    """inv_freq [R/2] in fp64, and the number of positions for which it is valid; None if for all."""
    kind, config = model.config.model_type, model.config.get_text_config()
    modules = [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
    tables = [module for module in model.modules() if isinstance(getattr(module, "embed_positions", None), Tensor)]
    if not modules and tables:  # GPT-J: sines and cosines, [positions, R]
        positions, size = tables[0].embed_positions.shape
        return (1.0 / (10000 ** (torch.arange(0, size, 2) / size))).double(), positions  # first fp32, as the model
    if not modules and any(name.endswith("_inv_freq") for name, _ in model.named_buffers()):
        raise UserError(f"model type {kind!r} has different rotary frequencies in different layers: not supported")
    if not modules:
        raise UserError(f"model type {kind!r} has no rotary positions that can be turned; streaming needs RoPE")
    limit = None
    for module in modules:
        scaling = getattr(module, "rope_type", "default")
        if scaling in BOUNDED_TYPES:
            scaled = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
            longrope = scaled.get("original_max_position_embeddings") if scaling == "longrope" else None
            # After a long text, transformers restores the frequencies only for a text below the length itself.
            limit = longrope or config.max_position_embeddings - 1
        elif scaling not in STATIC_TYPES:
            raise UserError(
                f"model type {kind!r} has rotary scaling {scaling!r}, which is not supported; supported are "
                f"{', '.join(STATIC_TYPES + BOUNDED_TYPES)}"
            )
        if not torch.equal(module.inv_freq, modules[0].inv_freq):
            raise UserError(f"model type {kind!r} has different rotary frequencies in different layers: not supported")
    # A long text changes the frequencies and the next short one restores them; take those that short texts use.
    inv_freq = modules[0].inv_freq if limit is None else getattr(modules[0], "original_inv_freq", modules[0].inv_freq)
    return inv_freq.detach().double().cpu(), limit


@torch.no_grad()  # not inference_mode: tensors that the model keeps from a trial must stay usable
def trial_keys(model: Any, run: Callable[..., Any], offset: int | None) -> list[Any]:
    """The cache layers after a trial: keys [PROBE_TOKENS, G, 1, D] of a few tokens at position `offset`, and values.

    Each row is a single token. Its softmax over one key is exactly 1, so every layer's input is the same at all
    positions, and keys differ only by their rotation. With `offset` None the model chooses the positions.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    rows = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(1, PROBE_TOKENS + 1, device=model.device) * 7 % rows).unsqueeze(1)
    place: dict[str, Any] = {}
    if offset is not None:
        place["position_ids"] = torch.full_like(ids, offset)
        if kind_of(model.config) == "kv_bias":  # its key is not rotated, so queries are turned back to it
            place["sink_turn"] = Rotary(frequencies(model)[0], False, ()).rotation(-offset, model.device)
    kind = model.config.model_type
    try:
        run(input_ids=ids, **place, past_key_values=cache, use_cache=True)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:  # for example of state-space layers
        raise UserError(f"model type {kind!r} does not run with a plain cache of keys and values: {error}") from None
    if not cache.layers or any(getattr(layer, "keys", None) is None for layer in cache.layers):
        raise UserError(f"model type {kind!r} does not keep keys in transformers' cache, so it cannot be streamed")
    return cache.layers


def sample_of(model: Any) -> list[float]:
    """A few of the model's weights, by which a saved stream recognises its model, since twins have equal signatures."""
    weights = model.get_input_embeddings().weight.detach().flatten()
    return weights[:: max(1, len(weights) // SAMPLE)][:SAMPLE].float().tolist()
