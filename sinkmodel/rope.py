"""Turning queries and keys that already carry their rotary position (RoPE) by a difference of positions.

    rotary = rotary_of(model)            # refuses, by name, what cannot be turned
    rotary.turn(key_BGND, 5 - 9)         # a key rotated at position 9 becomes the key rotated at position 5

RoPE turns pairs of dimensions of a head by the angle position × inv_freq[i]; angles add up, so a key at position p
becomes the key at position p + d by a turn of d × inv_freq, with no trip to the raw key. The pairs are (i, i + R/2)
in the half-split layout (Llama, GPT-NeoX), (2i, 2i + 1) in the interleaved one (GPT-J, Cohere); the R rotary dimensions
come first in a head, the other D − R pass. A constant factor on cos and sin (YaRN) is in the vector already and stays.
Angles are taken in fp64 and products in fp32, so a turn costs one rounding of the result.

Which layout a model has, and which of its layers have none (SmolLM3), is found out by trying, not by a list of names:
the model is run twice on the same few tokens, at two offsets, and the keys at the first, turned, must be those at the
second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkmodel.errors import UserError, not_finite
from sinkmodel.sinks import kind_of

STATIC_TYPES = ("default", "linear", "llama3", "yarn")  # one set of frequencies for all lengths
BOUNDED_TYPES = ("dynamic", "longrope")  # the same frequencies up to the original length, others beyond
PROBE_TOKENS, PROBE_SHIFT = 8, 37

Rotation = tuple[Tensor, Tensor]  # cos and sin of a turn, [..., R/2] in fp32


@dataclass(frozen=True)
class Rotary:
    """The rotary layout of a model: `inv_freq` [R/2] in fp64, over the first R dimensions of a head."""

    inv_freq: Tensor
    interleaved: bool
    layers: tuple[bool, ...]  # which layers have it
    limit: int | None = None  # positions must stay below; beyond them the model rotates in another way, or not at all

    def turn(self, x_BHND: Tensor, delta: int | Tensor) -> Tensor:
        """Move N vectors by `delta` positions (an int, or a tensor [N]): same shape and dtype as `x_BHND`."""
        return self.apply(x_BHND, self.rotation(delta, x_BHND.device)).to(x_BHND.dtype)

    def rotation(self, delta: int | Tensor, device: torch.device | str = "cpu") -> Rotation:
        """cos and sin of the turn, [*delta.shape, R/2] in fp32: computed once, applied in every layer."""
        # On the CPU: fp64 is missing on some accelerators, and these are few numbers.
        angle = torch.as_tensor(delta, dtype=torch.float64, device="cpu")[..., None] * self.inv_freq
        return angle.cos().float().to(device), angle.sin().float().to(device)

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves [..., R/2] of the rotary dimensions, as views."""
        half = len(self.inv_freq)
        if self.interleaved:
            return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        return x[..., :half], x[..., half : 2 * half]

    def turned_pairs(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """The pairs after the turn, in fp32."""
        (cos, sin), (a, b) = rotation, self.pairs(x.float())
        return a * cos - b * sin, b * cos + a * sin

    def apply(self, x: Tensor, rotation: Rotation) -> Tensor:
        """The turned vectors, in fp32."""
        if not self.interleaved:
            return turn_half_split(x, rotation)
        rest = x[..., 2 * len(self.inv_freq) :].float()
        return torch.cat([torch.stack(self.turned_pairs(x, rotation), dim=-1).flatten(-2), rest], dim=-1)


def turn_half_split(x: Tensor, rotation: Rotation) -> Tensor:
    """`Rotary.apply` where the pairs are (i, i + R/2), with nothing but the rotation: fp32, the shape of x [..., D]."""
    cos, sin = rotation
    half = cos.shape[-1]
    a, b, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def rotary_of(model: Any, run: Callable[..., Any] | None = None) -> Rotary:
    """The rotary layout of a transformers causal language model; UserError where its keys cannot be turned.

    `run` is the model's forward where that is not to be called through the model.
    """
    run = run or model
    kind = model.config.model_type
    inv_freq, limit = frequencies(model)
    shift = max(1, min(PROBE_SHIFT, (limit or 2 * PROBE_SHIFT) - 1))
    near, far = ([layer.keys for layer in trial_keys(model, run, offset)] for offset in (0, shift))
    if not all(bool(torch.isfinite(key).all()) for key in near):
        raise not_finite(model, "keys")
    tolerance = 1e-3 if near[0].dtype == torch.float32 else 0.05  # a wrong layout is off by a third and more
    understood = 0  # layers, from the first on
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
    """inv_freq [R/2] in fp64, and the number of positions that it holds for, where there is one."""
    kind, config = model.config.model_type, model.config.get_text_config()
    modules = [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
    tables = [module for module in model.modules() if isinstance(getattr(module, "embed_positions", None), Tensor)]
    if not modules and tables:  # GPT-J: sines and cosines, [positions, R]
        positions, size = tables[0].embed_positions.shape
        return (1.0 / (10000 ** (torch.arange(0, size, 2) / size))).double(), positions  # in fp32 first, as it has them
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
            # transformers puts frequencies that a long text has grown back only below the length itself.
            limit = longrope or config.max_position_embeddings - 1
        elif scaling not in STATIC_TYPES:
            raise UserError(
                f"model type {kind!r} has rotary scaling {scaling!r}, which is not supported; supported are "
                f"{', '.join(STATIC_TYPES + BOUNDED_TYPES)}"
            )
        if not torch.equal(module.inv_freq, modules[0].inv_freq):
            raise UserError(f"model type {kind!r} has different rotary frequencies in different layers: not supported")
    # What a long text has grown is put back by the next short one; the original is what short ones use.
    inv_freq = modules[0].inv_freq if limit is None else getattr(modules[0], "original_inv_freq", modules[0].inv_freq)
    return inv_freq.detach().double().cpu(), limit


@torch.no_grad()  # not inference_mode: what a model keeps of a trial must go on being of use
def trial_keys(model: Any, run: Callable[..., Any], offset: int | None) -> list[Any]:
    """A cache layer each: keys of a few tokens at position `offset`, [PROBE_TOKENS, G, 1, D], and values.

    A token a row: a softmax over one key is exactly 1, so that a layer's input is the same at every position, and what
    differs is the rotation. `offset` None leaves the positions to the model.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    rows = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(1, PROBE_TOKENS + 1, device=model.device) * 7 % rows).unsqueeze(1)
    where: dict[str, Any] = {}
    if offset is not None:
        where["position_ids"] = torch.full_like(ids, offset)
        if kind_of(model.config) == "kv_bias":  # a second key, which stands still: the queries are brought back to it
            where["sink_turn"] = Rotary(frequencies(model)[0], False, ()).rotation(-offset, model.device)
    kind = model.config.model_type
    try:
        run(input_ids=ids, **where, past_key_values=cache, use_cache=True)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:  # state-space layers and the like
        raise UserError(f"model type {kind!r} does not run with a plain cache of keys and values: {error}") from None
    if not cache.layers or any(getattr(layer, "keys", None) is None for layer in cache.layers):
        raise UserError(f"model type {kind!r} does not keep keys in transformers' cache, so it cannot be streamed")
    return cache.layers
