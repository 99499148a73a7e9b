"""Ctrl-C and SIGTERM: the handler only sets a flag; the run stops at the next step boundary, saved."""

from __future__ import annotations

import signal
from types import FrameType

from lightning.pytorch import Callback, LightningModule, Trainer

from recipes.training.steps import at_step_boundary
from sinkmodel.console import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedAtOnce(BaseException):
    """A second signal. Not a KeyboardInterrupt, which Lightning would turn into exit code 1, "the answer is no"."""


class StopOnSignal(Callback):
    """Sets `trainer.should_stop` at a step boundary, before `Checkpoints` looks at it. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise StoppedAtOnce
        self.received = number
        say(f"{signal.Signals(number).name}: saving at the end of this step; once more stops without saving")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        if self.received is not None and at_step_boundary(trainer, batch_idx):
            trainer.should_stop = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
