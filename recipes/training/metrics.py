"""What is logged each N steps, computed from tensors that stayed on the device in between."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from recipes.training.health import stop_if_not_finite
from recipes.training.module import sink_share
from recipes.training.steps import at_step_boundary


def ppl(nll: float) -> float:
    """exp(nll), infinite where that overflows."""
    return math.exp(nll) if nll < 700 else math.inf


class Metrics(Callback):
    """Averages since the last line, once every `every` steps.

    The averages are part of the checkpoint, so that a resumed run logs the same numbers, bit for bit.

    Args:
        run: the run folder, for naming the last good checkpoint.
        every: optimiser steps between two lines.
        tokens_per_step: text and sink tokens of one optimiser step.
        flops_per_token, peak_flops: for MFU.
    """

    def __init__(self, run: Path, every: int, tokens_per_step: int, flops_per_token: float, peak_flops: float):
        self.run, self.every, self.tokens_per_step = run, every, tokens_per_step
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.loss_sum, self.twin_sum = torch.zeros(()), torch.zeros(())
        self.micro_batches = 0
        self.clock, self.clock_step = 0.0, 0
        self.latest: dict[str, float] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"loss_sum": self.loss_sum, "twin_sum": self.twin_sum, "micro_batches": self.micro_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loss_sum, self.twin_sum = state_dict["loss_sum"], state_dict["twin_sum"]
        self.micro_batches = state_dict["micro_batches"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loss_sum, self.twin_sum = self.loss_sum.to(pl_module.device), self.twin_sum.to(pl_module.device)
        self.clock, self.clock_step = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx) -> None:
        self.loss_sum = self.loss_sum + pl_module.loss
        self.twin_sum = self.twin_sum + pl_module.twin_loss
        self.micro_batches += 1
        if not at_step_boundary(trainer, batch_idx):
            return
        step = trainer.global_step
        if step % self.every == 0 or step == trainer.max_steps:
            self.write_line(trainer, pl_module, batch)

    def write_line(self, trainer: Trainer, pl_module: LightningModule, batch) -> None:
        """The one place that waits for the device."""
        step = trainer.global_step
        stop_if_not_finite(pl_module, self.run)
        share = sink_share(pl_module.model, batch[0][0], pl_module.sinks)
        loss, twin_loss, grad_norm, share = torch.stack(
            [self.loss_sum / self.micro_batches, self.twin_sum / self.micro_batches, pl_module.grad_norm, share]
        ).tolist()
        seconds = time.perf_counter() - self.clock
        speed = (step - self.clock_step) * self.tokens_per_step / seconds
        self.latest = {
            "tokens": step * self.tokens_per_step,
            "loss": loss,
            "ppl": ppl(loss),
            "twin_loss": twin_loss,
            "lr": pl_module.schedule.lr(step - 1, pl_module.optimizer_settings.lr),
            "grad_norm": grad_norm,
            "sink_share": share,
            "tokens_per_second": speed,
            "mfu": speed * self.flops_per_token / (self.peak_flops * trainer.world_size),
        }
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step)
        self.loss_sum, self.twin_sum = torch.zeros_like(self.loss_sum), torch.zeros_like(self.twin_sum)
        self.micro_batches = 0
        self.clock, self.clock_step = time.perf_counter(), step

    def exclude(self, seconds: float) -> None:
        """Leave time that was not spent on training out of the throughput."""
        self.clock += seconds
