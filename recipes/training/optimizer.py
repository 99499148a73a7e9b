"""AdamW with Pythia's parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from recipes.training.settings import OptimizerSettings


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
