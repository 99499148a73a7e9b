"""The progress of a run: a bar in a terminal, plain lines in a file."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from recipes.training.callbacks.ending import EndsWithTheRun
from recipes.training.callbacks.metrics import Metrics
from recipes.training.callbacks.steps import at_step_boundary
from sinkmodel.console import say


class Progress(EndsWithTheRun):
    """Shows the latest line of `Metrics`; reads nothing from the device itself."""

    def __init__(self, metrics: Metrics, steps: int):
        self.metrics, self.steps = metrics, steps
        self.bar: tqdm | None = None
        self.shown: dict[str, float] | None = None

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start, self.first_step = time.monotonic(), trainer.global_step
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.steps, initial=trainer.global_step, unit="step", dynamic_ncols=True)

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_step_boundary(trainer, batch_idx):
            return
        fresh = self.metrics.latest is not self.shown
        self.shown = self.metrics.latest
        if self.bar is not None:
            if fresh and self.shown:
                self.bar.set_postfix_str(
                    f"loss {self.shown['loss']:.3f}, {self.shown['tokens_per_second']:,.0f} tokens/s"
                )
            self.bar.update()
        elif fresh and self.shown:
            say(self.line(trainer.global_step, self.shown))

    def line(self, step: int, line: dict[str, float]) -> str:
        left = (time.monotonic() - self.start) / (step - self.first_step) * (self.steps - step)
        return (
            f"step {step}/{self.steps}  loss {line['loss']:.4f}  ppl {line['ppl']:.2f}  lr {line['lr']:.2e}  "
            f"|g| {line['grad_norm']:.2f}  sink α {line['sink_alpha']:.3f}  "
            f"{line['tokens_per_second']:,.0f} tokens/s  mfu {line['mfu']:.1%}  {left / 60:.1f} min left"
        )

    def end(self) -> None:
        if self.bar is not None:
            self.bar.close()
