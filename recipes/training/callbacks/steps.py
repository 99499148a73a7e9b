"""An optimiser step as the callbacks see it: where it ends, and its losses and gradient norm."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from recipes.training.processes.ranks import mean
from recipes.training.processes.strategies import zero_stage


def at_step_boundary(trainer: Trainer, batch_idx: int) -> bool:
    """Whether micro-batch `batch_idx` was the last of its optimiser step; `global_step` then counts that step.

    Callbacks act only then, never between two micro-batches of a step.
    """
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class StepMeans(Callback):
    """Averages a step's losses over its micro-batches and the ranks, on the device. Later callbacks read them.

    Attributes:
        losses: mean nll over all targets and over those that a twin shares, [2]; the same on every rank.
        grad_norm: norm of the whole gradient before clipping, a scalar.
    """

    losses: torch.Tensor
    grad_norm: torch.Tensor

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.sums = pl_module.losses if self.sums is None else self.sums + pl_module.losses
        if at_step_boundary(trainer, batch_idx):
            self.losses, self.sums = mean(self.sums / trainer.accumulate_grad_batches), None
            zero = zero_stage(trainer) > 0
            norm = trainer.strategy.deepspeed_engine.get_global_grad_norm() if zero else pl_module.grad_norm
            self.grad_norm = torch.as_tensor(norm, dtype=torch.float32, device=self.losses.device)
