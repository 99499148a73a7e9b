"""Where one optimiser step ends: callbacks act there, and nowhere between two micro-batches."""

from __future__ import annotations

from lightning.pytorch import Trainer


def at_step_boundary(trainer: Trainer, batch_idx: int) -> bool:
    """Whether micro-batch `batch_idx` was the last of its optimiser step; `global_step` then counts that step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0
