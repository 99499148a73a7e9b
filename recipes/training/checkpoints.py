"""When checkpoints are written, which are kept, and that a file is either complete or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from recipes.training.health import stop_if_not_finite, stop_if_weights_are_not_finite
from recipes.training.settings import CheckpointSettings
from recipes.training.steps import at_step_boundary
from sinkmodel.checkpoint import checkpoint_steps
from sinkmodel.files import DiskFull, atomic_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint file, written aside, synced and renamed; read without running anything in it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            with atomic_file(path) as aside:
                torch.save(checkpoint, aside)
        except DiskFull:
            kept = list(checkpoint_steps(path.parent.parent).values())
            before = f"the last complete checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
            raise DiskFull(
                f"the disk is full: {path.name} could not be written to {path.parent}; {before}; "
                "make room and run the same command again"
            ) from None

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)


class Checkpoints(Callback):
    """Saves at the steps that the settings name, at the last step, and on demand; removes what need not stay."""

    def __init__(self, run: Path, settings: CheckpointSettings, last_step: int):
        self.run, self.settings, self.last_step = run, settings, last_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0 and self.settings.due(0):
            self.save(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        if at_step_boundary(trainer, batch_idx):
            step = trainer.global_step
            if self.settings.due(step) or step == self.last_step or trainer.should_stop:
                self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        stop_if_not_finite(trainer.lightning_module, self.run)
        stop_if_weights_are_not_finite(trainer.lightning_module, self.run)
        trainer.save_checkpoint(self.run / "checkpoints" / f"step{trainer.global_step}.ckpt")
        if trainer.is_global_zero:
            passing = [path for step, path in checkpoint_steps(self.run).items() if not self.settings.stays(step)]
            for path in passing[: -self.settings.keep]:
                path.unlink()
