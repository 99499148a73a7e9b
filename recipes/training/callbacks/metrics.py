"""The numbers of a run every N steps: `Metrics` computes and logs them, `Progress` shows them in a terminal or a file.

They are computed from tensors that stay on the device in between.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from recipes.training.callbacks.ending import EndsWithTheRun
from recipes.training.callbacks.health import Health
from recipes.training.callbacks.steps import StepMeans, at_step_boundary
from sinkmodel.console import say
from sinkmodel.perplexity import perplexity


class Metrics(Callback):
    """Logs averages over the steps since the last line, every `every` steps.

    Their sums are saved in the checkpoint, so that a resumed run logs the same numbers, bit for bit.

    Args:
        every: optimiser steps between two lines.
        tokens_per_step: text and sink tokens of one optimiser step.
        flops_per_token: floating-point operations of one token, for MFU.
        peak_flops: peak FLOP/s of one device, for MFU.
    """

    def __init__(
        self,
        means: StepMeans,
        health: Health,
        every: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float,
    ):
        self.means, self.health, self.every, self.tokens_per_step = means, health, every, tokens_per_step
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.sums, self.steps = torch.zeros(2), 0  # the losses of `StepMeans` over the steps since the last line
        self.clock, self.clock_step = 0.0, 0
        self.latest: dict[str, float] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sums, self.steps = state_dict["sums"], state_dict["steps"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sums = self.sums.to(pl_module.device)
        self.clock, self.clock_step = time.perf_counter(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_step_boundary(trainer, batch_idx):
            return
        self.sums, self.steps = self.sums + self.means.losses, self.steps + 1
        step = trainer.global_step
        if step % self.every == 0 or step == trainer.max_steps:
            self.write_line(trainer, pl_module)

    def write_line(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log a line. No other method of this class waits for the device."""
        step = trainer.global_step
        self.health.look(trainer)
        sinks = pl_module.measure_sink(trainer.datamodule.first_row_of(step).to(pl_module.device))
        loss, twin_loss, grad_norm, sink_alpha, sink_metric = torch.stack(
            [*(self.sums / self.steps), self.means.grad_norm, *sinks]
        ).tolist()
        seconds = time.perf_counter() - self.clock
        speed = (step - self.clock_step) * self.tokens_per_step / seconds
        self.latest = {
            "tokens": step * self.tokens_per_step,
            "loss": loss,
            "ppl": perplexity(loss),
            "twin_loss": twin_loss,
            "lr": pl_module.schedule.lr(step - 1, pl_module.optimizer_settings.peak),
            "grad_norm": grad_norm,
            "sink_alpha": sink_alpha,
            "sink_metric": sink_metric,
            "tokens_per_second": speed,
            "mfu": speed * self.flops_per_token / (self.peak_flops * trainer.world_size),
        }
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step)
        self.sums, self.steps = torch.zeros_like(self.sums), 0
        self.clock, self.clock_step = time.perf_counter(), step

    def exclude(self, seconds: float) -> None:
        """Exclude `seconds` that were not spent on training from the throughput."""
        self.clock += seconds


class Progress(EndsWithTheRun):
    """Shows the latest line of `Metrics`: a bar in a terminal, plain lines in a file. Reads nothing from the device."""

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
