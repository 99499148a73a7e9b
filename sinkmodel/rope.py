"""Turning queries and keys that already carry their rotary position (RoPE) by a difference of positions.

    rotary = sinkmodel.probe.rotary_of(model)
    rotary.turn(key_BGND, 5 - 9)         # a key rotated at position 9 becomes the key rotated at position 5

RoPE turns pairs of dimensions of a head by the angle position × inv_freq[i]. Angles add up, so a turn by d × inv_freq
moves a key from position p to position p + d without the unrotated key. The pairs are (i, i + R/2) in the half-split
layout (Llama, GPT-NeoX) and (2i, 2i + 1) in the interleaved one (GPT-J, Cohere). The R rotary dimensions come first in
a head; the other D − R stay unchanged. A constant factor on cos and sin (YaRN) is already in the vector and stays.
Angles are computed in fp64 and products in fp32, so a turn costs one rounding of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]  # cos and sin of a turn, [..., R/2] in fp32


@dataclass(frozen=True)
class Rotary:
    """The rotary layout of a model: `inv_freq` [R/2] in fp64, over the first R dimensions of a head."""

    inv_freq: Tensor
    interleaved: bool
    layers: tuple[bool, ...]  # True for each layer that rotates its keys
    limit: int | None = None  # the layout is valid only for positions below it; None: for all

    def turn(self, x_BHND: Tensor, delta: int | Tensor) -> Tensor:
        """Move N vectors by `delta` positions (an int, or a tensor [N]): same shape and dtype as `x_BHND`."""
        return self.apply(x_BHND, self.rotation(delta, x_BHND.device)).to(x_BHND.dtype)

    def rotation(self, delta: int | Tensor, device: torch.device | str = "cpu") -> Rotation:
        """cos and sin of the turn, [*delta.shape, R/2] in fp32: computed once, applied in every layer."""
        # On the CPU, since some accelerators lack fp64 and these are few numbers.
        angle = torch.as_tensor(delta, dtype=torch.float64, device="cpu")[..., None] * self.inv_freq
        return angle.cos().float().to(device), angle.sin().float().to(device)

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves [..., R/2] of the rotary dimensions, as views."""
        half = self.inv_freq.shape[0]  # `len` of a tensor is slow, and this runs in every step
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
    """`Rotary.apply` for pairs (i, i + R/2), from the rotation alone: fp32, the shape of x [..., D]."""
    cos, sin = rotation
    half = cos.shape[-1]
    a, b, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
