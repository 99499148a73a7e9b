"""A run that has gone wrong ends with a message, and never overwrites what was good."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningModule

from recipes.training.module import NEVER
from sinkmodel.checkpoint import checkpoint_steps
from sinkmodel.errors import UserError


def stop_if_not_finite(pl_module: LightningModule, run: Path) -> None:
    """Raises UserError (exit code 1) where a loss or gradient since the start was not finite. Waits for the device."""
    first = int(pl_module.first_bad_step)
    if first == NEVER:
        return
    _stop(f"the loss or gradient of step {first} is not finite", first, run)


def stop_if_weights_are_not_finite(pl_module: LightningModule, run: Path) -> None:
    """The same for the weights: a checkpoint of them would be no good one. Waits for the device."""
    step = pl_module.trainer.global_step
    if not torch.stack([parameter.isfinite().all() for parameter in pl_module.model.parameters()]).all():
        _stop(f"the weights behind step {step} are not finite", step, run)


def _stop(what: str, first: int, run: Path) -> None:
    good = [path for step, path in checkpoint_steps(run).items() if step < first]
    last = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint was written before it"
    raise UserError(
        f"{what}; {last}; lower optimizer.lr or raise schedule.warmup, and start in a new output folder",
        exit_code=1,
    )
