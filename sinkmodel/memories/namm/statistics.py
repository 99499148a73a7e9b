"""The statistics of a NAMM: mean and variance of each bin, measured on a host model that evicts nothing.

They are measured once, before an evolution, and then belong to the artefact.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sinkmodel.errors import UserError
from sinkmodel.memories.layer import MemoryLayer
from sinkmodel.memories.namm.config import NAMMConfig
from sinkmodel.memories.namm.memory import NAMM
from sinkmodel.memories.pieces import Piece
from sinkmodel.memories.selection import EMPTY


def measure_statistics(model: Any, prompts: Iterable[Tensor], config: NAMMConfig | None = None) -> NAMMConfig:
    """The config with the statistics of these prompts, over all decisions, layers, heads and tokens.

    Args:
        prompts: token ids [B, N]. Prompts shorter than `interval` are ignored.
        config: the settings; None for the defaults.

    Raises UserError if no prompt is long enough.
    """
    config = (config or NAMMConfig()).replace(mean=(), variance=())
    measured = _Measured(config.bins)
    for ids in prompts:
        memory = _Measuring(model, config)
        memory.measured = measured
        model(ids, past_key_values=memory, logits_to_keep=1)
    if not measured.count:
        raise UserError(f"no prompt has {config.interval} tokens, the interval of this NAMM; give longer ones")
    mean, variance = measured.mean, measured.spread / measured.count
    return config.replace(mean=tuple(mean.tolist()), variance=tuple(variance.tolist()))


class _Measured:
    """Count, mean and sum of squared deviations (Chan et al. 1983), [bins] in fp64."""

    def __init__(self, bins: int):
        self.count = 0
        self.mean, self.spread = torch.zeros(bins, dtype=torch.float64), torch.zeros(bins, dtype=torch.float64)

    def add(self, x_NF: Tensor) -> None:
        x_NF = x_NF.double().cpu()
        count, mean = len(x_NF), x_NF.mean(dim=0)
        step, total = mean - self.mean, self.count + count
        self.spread += (x_NF - mean).square().sum(dim=0) + step.square() * (self.count * count / total)
        self.mean += step * (count / total)
        self.count = total


class _Measuring(NAMM):
    """Records the spectrum at each decision, and keeps everything."""

    measured: _Measured

    def _evict(self, layer: MemoryLayer, piece: Piece) -> None:
        rows = self._deciding(piece.seen)
        spectrum_BGKF = layer.held_numbers("spectrum")[rows].transpose(-1, -2)
        self.measured.add(spectrum_BGKF[layer.held_positions()[rows] != EMPTY])
