"""The base of callbacks that must release something when the run ends, successfully or not."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer


class EndsWithTheRun(Callback):
    """A callback whose `end` is always called when `Trainer.fit` ends.

    Lightning calls `teardown` only if nothing raised (trainer/call.py, `_call_and_handle_interrupt`).
    """

    def end(self) -> None:
        raise NotImplementedError

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.end()
