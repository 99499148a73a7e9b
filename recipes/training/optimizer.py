"""AdamW with Pythia's parameter groups."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from sinkmodel.errors import UserError


@dataclass(frozen=True)
class OptimizerSettings:
    """Defaults: Pythia-160M's.

    Args:
        lr: peak learning rate.
        betas: decay rates of the two moments.
        weight_decay: decoupled, on every matrix, embeddings included; never on norms and biases.
        clip: largest norm of the gradient over all parameters; 0 leaves it as it is.
    """

    lr: float = 6e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas is {self.betas}; it takes two numbers from 0 to below 1")
        for name in ("lr", "eps", "weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must not be negative")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices are decayed, vectors (norms and biases) are not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        fused=True,
    )
