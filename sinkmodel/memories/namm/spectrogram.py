"""The features of a NAMM: how the attention to a token changed over time, and the age of the token.

Each token has a signal: the attention that every later query pays to it, averaged over the query heads of its KV head.
A frame of the spectrogram is the magnitude of the Fourier transform of `window` values under a periodic Hann window.
There is one frame every `hop` queries (paper, section 3). Complete frames are added to a moving average:

    spectrum ← γ^hop · spectrum + (1 − γ^hop) · frame

Over a whole interval this equals the published sum over its frames. So only the last window − hop values of a signal
have to be kept, by which the frames of one interval and the next overlap.

Shapes: B rows, G KV heads, K slots, N queries. The slots come last, so that a frame is a small matrix times a wide one.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from sinkmodel.memories.namm.config import NAMMConfig

SMALLEST_DEVIATION = 1e-7  # lower bound for the standard deviation of a bin


@functools.lru_cache(maxsize=8)
def transform(window: int, device: torch.device) -> Tensor:
    """The windowed Fourier transform [2 · bins, window]: rows for the real parts, then for the imaginary parts."""
    steps = torch.arange(window, dtype=torch.float64)
    angles = 2 * math.pi / window * torch.outer(torch.arange(window // 2 + 1, dtype=torch.float64), steps)
    hann = 0.5 - 0.5 * torch.cos(2 * math.pi / window * steps)
    return (torch.cat([angles.cos(), -angles.sin()]) * hann).float().to(device)


def add_hop(spectrum_XFK: Tensor, past_XTK: Tensor, hop_XNK: Tensor, config: NAMMConfig) -> None:
    """Add one frame to the moving averages of X KV heads, in place.

    Args:
        past_XTK: the window − hop values before the frame; updated to those before the next frame.
        hop_XNK: the attention of the latest `hop` queries to each slot.
    """
    signal = torch.cat([past_XTK, hop_XNK], dim=1)
    parts = torch.bmm(transform(config.window, signal.device).expand(len(signal), -1, -1), signal)
    real, imaginary = parts.chunk(2, dim=1)
    magnitude = (real * real).addcmul_(imaginary, imaginary).sqrt_()
    spectrum_XFK.lerp_(magnitude, 1 - config.gamma**config.hop)
    past_XTK.copy_(signal[:, config.hop :])


def features(spectrum_BGFK: Tensor, age_BGK: Tensor, config: NAMMConfig) -> Tensor:
    """[B, G, K, features], in the spectrum's dtype: the code of the age, then the spectrum, normalised."""
    half = config.age_size // 2
    rates = config.age_base ** -(torch.arange(half, dtype=torch.float64, device=age_BGK.device) / half)
    angles = age_BGK[..., None].double() * rates
    spectrum = spectrum_BGFK.transpose(-1, -2)
    if config.mean:
        mean, variance = (torch.tensor(x, device=spectrum.device) for x in (config.mean, config.variance))
        spectrum = (spectrum - mean) / variance.sqrt().clamp(min=SMALLEST_DEVIATION)
    return torch.cat([angles.sin().to(spectrum.dtype), angles.cos().to(spectrum.dtype), spectrum], dim=-1)
