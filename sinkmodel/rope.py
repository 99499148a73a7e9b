"""Turning queries and keys that already carry their rotary position (RoPE) by a difference of positions.

    rotary = rotary_of(model)            # refuses, by name, what cannot be turned
    rotary.turn(key_BGND, 5 - 9)         # a key rotated at position 9 becomes the key rotated at position 5

RoPE turns each pair of dimensions (i, i + R/2) of a head by the angle position × inv_freq[i]; angles add up, so a key
at position p becomes the key at position p + d by a turn of d × inv_freq, with no trip to the raw key. The R rotary
dimensions come first in a head, the other D − R pass (GPT-NeoX). A constant factor on cos and sin (YaRN) is in the
vector already and stays. Angles are taken in fp64 and products in fp32, so a turn costs one rounding of the result.

What this cannot do is found out by trying, not by a list of names: the model is run twice on the same few tokens, at
two offsets, and the keys of every layer at the first, turned, must be its keys at the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkmodel.errors import UserError

STATIC_TYPES = ("default", "linear", "llama3", "yarn")  # one set of frequencies for all lengths
PROBE_TOKENS, PROBE_SHIFT = 8, 37


@dataclass(frozen=True)
class Rotary:
    """The rotary layout of a model: `inv_freq` [R/2] in fp64, half-split, over the first R dimensions of a head."""

    inv_freq: Tensor

    def turn(self, x_BHND: Tensor, delta: int | Tensor) -> Tensor:
        """Move N vectors by `delta` positions (an int, or a tensor [N]): same shape and dtype as `x_BHND`."""
        return apply(x_BHND, self.rotation(delta, x_BHND.device)).to(x_BHND.dtype)

    def rotation(self, delta: int | Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """cos and sin of the turn, [N or 1, R/2] in fp32: computed once, applied in every layer."""
        # On the CPU: fp64 is missing on some accelerators, and these are N numbers.
        angle = torch.as_tensor(delta, dtype=torch.float64, device="cpu").reshape(-1, 1) * self.inv_freq
        return angle.cos().float().to(device), angle.sin().float().to(device)


def apply(x_BHND: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """The turned vectors, in fp32."""
    cos, sin = rotation
    half = cos.shape[-1]
    x_BHND = x_BHND.float()
    a, b, rest = x_BHND[..., :half], x_BHND[..., half : 2 * half], x_BHND[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def rotary_of(model: Any) -> Rotary:
    """The rotary layout of a transformers causal language model; UserError where its keys cannot be turned."""
    kind = model.config.model_type
    modules = [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
    if not modules:
        raise UserError(f"model type {kind!r} has no rotary positions that can be turned; streaming needs RoPE")
    for module in modules:
        scaling = getattr(module, "rope_type", "default")
        if scaling not in STATIC_TYPES:
            raise UserError(
                f"model type {kind!r} has rotary scaling {scaling!r}, whose frequencies change with the length of the "
                f"text, so cached keys cannot be moved; supported are {', '.join(STATIC_TYPES)}"
            )
        if not torch.equal(module.inv_freq, modules[0].inv_freq):
            raise UserError(f"model type {kind!r} has different rotary frequencies in different layers: not supported")
    rotary = Rotary(modules[0].inv_freq.detach().double().cpu())
    _prove(model, rotary)
    return rotary


@torch.inference_mode()
def _prove(model: Any, rotary: Rotary) -> None:
    near, far = _keys_at(model, 0), _keys_at(model, PROBE_SHIFT)
    tolerance = 1e-3 if near[0].dtype == torch.float32 else 0.1  # a wrong layout is off by a third and more
    for layer, (key, moved) in enumerate(zip(near, far)):
        error = (rotary.turn(key, PROBE_SHIFT).float() - moved.float()).norm() / moved.float().norm()
        if not error < tolerance:
            raise UserError(
                f"model type {model.config.model_type!r} rotates the keys of layer {layer} in a way that is not "
                f"supported (half-split RoPE is; relative error {error:.2g} on a trial turn)"
            )


def _keys_at(model: Any, offset: int) -> list[Tensor]:
    """The keys of every layer for the same few tokens, standing at positions `offset` …, [1, G, PROBE_TOKENS, D]."""
    from transformers import DynamicCache

    cache = DynamicCache()
    rows = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(1, PROBE_TOKENS + 1, device=model.device) * 7 % rows).unsqueeze(0)
    positions = torch.arange(offset, offset + PROBE_TOKENS, device=model.device).unsqueeze(0)
    kind = model.config.model_type
    try:
        model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        keys = [layer.keys for layer in cache.layers]
    except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:  # state-space layers and the like
        raise UserError(f"model type {kind!r} does not run with a plain cache of keys and values: {error}") from None
    if not keys or any(key is None for key in keys):
        raise UserError(f"model type {kind!r} does not keep keys in transformers' cache, so it cannot be streamed")
    return keys
