"""AdamW with Pythia's parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from recipes.training.settings import OptimizerSettings
from sinkmodel.softmax_sinks.architectures import PARAMETER as SINK_PARAMETER


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's groups: weight decay for matrices, none for vectors (norms, biases) and sinks in the softmax."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    plain = [parameter.ndim < 2 or name.endswith(f".{SINK_PARAMETER}") for name, parameter in named]
    groups = [
        {"params": [p for (_, p), free in zip(named, plain) if not free], "weight_decay": weight_decay},
        {"params": [p for (_, p), free in zip(named, plain) if free], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]  # a frozen model may have an empty one


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.peak,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        fused=True,
    )
