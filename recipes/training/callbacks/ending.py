"""What a callback must give back when the run ends, whether it ends well or not."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer


class EndsWithTheRun(Callback):
    """A callback whose `end` is called however `Trainer.fit` ends: Lightning calls `teardown` only if nothing raised
    (trainer/call.py, `_call_and_handle_interrupt`)."""

    def end(self) -> None:
        raise NotImplementedError

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.end()
