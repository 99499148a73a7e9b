"""What an optimiser step is to the callbacks: where it ends, what it lost, and which rows it read."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from recipes.training.processes.ranks import mean
from recipes.training.processes.strategies import zero_stage


def at_step_boundary(trainer: Trainer, batch_idx: int) -> bool:
    """Whether micro-batch `batch_idx` was the last of its optimiser step; `global_step` then counts that step.

    Callbacks act there, and nowhere between two micro-batches.
    """
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class StepMeans(Callback):
    """The step's losses, the mean over its micro-batches and over the ranks, on the device; the first of the callbacks.

    Attributes:
        losses: nll over all targets and over those that a twin shares, [2]; the same on every rank.
        grad_norm: of the whole gradient before clipping, a scalar.
    """

    losses: torch.Tensor
    grad_norm: torch.Tensor

    def __init__(self) -> None:
        self.sums: torch.Tensor | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        self.sums = pl_module.losses if self.sums is None else self.sums + pl_module.losses
        if at_step_boundary(trainer, batch_idx):
            self.losses, self.sums = mean(self.sums / trainer.accumulate_grad_batches), None
            zero = zero_stage(trainer) > 0
            norm = trainer.strategy.deepspeed_engine.get_global_grad_norm() if zero else pl_module.grad_norm
            self.grad_norm = torch.as_tensor(norm, dtype=torch.float32, device=self.losses.device)
