"""When checkpoints are written and which are kept; a checkpoint file is either complete or absent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils._pytree import tree_map_only

from recipes.training.callbacks.health import Health
from recipes.training.callbacks.steps import at_step_boundary
from recipes.training.settings import PretrainConfig
from sinkmodel.checkpoint import checkpoint_steps, load_tensors, write_manifest
from sinkmodel.files import DiskFull, atomic_file, sha256_of


class BackgroundCheckpointIO(TorchCheckpointIO):
    """Copies a checkpoint to memory while training waits, and writes the file while training continues.

    The file is written under a temporary name and synced, its checksum is added to `checkpoints/SHA256SUMS`, and then
    the file is renamed. Loading runs no code from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.afterwards: Callable[[], None] = lambda: None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.wait()
        if self.failed:
            return  # `StopOnSignal` shares it at the next step boundary, where all ranks stop
        # Copy tensors that are on the CPU already, too: the next step changes them in place.
        copied = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), checkpoint)
        self._thread = threading.Thread(target=self._write, args=(copied, Path(path)), name="checkpoint")
        self._thread.start()

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            with atomic_file(path) as aside:
                torch.save(checkpoint, aside)
                write_manifest(path.parent, path.name, sha256_of(aside))
            self.afterwards()
        except DiskFull:
            kept = list(checkpoint_steps(path.parent.parent).values())
            before = f"the last complete checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
            self._failure = DiskFull(
                f"the disk is full: {path.name} could not be written to {path.parent}; {before}; "
                "make room and run the same command again"
            )
        except BaseException as failure:
            self._failure = failure

    @property
    def failed(self) -> bool:
        """Whether the last file could not be written; `finish` raises the reason."""
        return self._failure is not None

    def wait(self) -> None:
        """Wait until the last file is complete, or could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """`wait`, then raise the error of the last write, once. DiskFull names the checkpoint that is left."""
        self.wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def teardown(self) -> None:
        self.wait()  # `finish` raises an error after Lightning's teardown, so that all ranks get it

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return load_tensors(Path(path), mmap=True)


class Checkpoints(Callback):
    """Saves at the steps of the settings, at the last step, and when training is stopped; removes old checkpoints."""

    def __init__(self, run: Path, config: PretrainConfig, io: BackgroundCheckpointIO, health: Health):
        self.run, self.config, self.io, self.health = run, config, io, health
        io.afterwards, health.settle = self._remove_old, io.wait
        self._written = 0  # the step of the last save

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0 and self.config.saves(0):
            self.save(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_step_boundary(trainer, batch_idx):
            step = trainer.global_step
            if self.config.saves(step) or step == self.config.schedule.steps or trainer.should_stop:
                self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        self.health.look(trainer)
        self.health.stop_if_weights_are_not_finite(trainer.lightning_module)
        self._written = trainer.global_step
        trainer.save_checkpoint(self.run / "checkpoints" / f"step{trainer.global_step}.ckpt")

    def _remove_old(self) -> None:
        # A damaged file of a later step, which this run could not resume from, must not push out new checkpoints.
        steps = checkpoint_steps(self.run).items()
        passing = [path for step, path in steps if step <= self._written and not self.config.keeps(step)]
        for path in passing[: -self.config.checkpoints.keep]:
            path.unlink()
        write_manifest(self.run / "checkpoints")
