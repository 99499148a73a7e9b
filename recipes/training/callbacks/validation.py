"""Validation loss, measured at a step boundary before the checkpoint of that step is written.

Lightning's own loop validates after the checkpoint hook: a kill in between would lose the line or write it twice.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from recipes.training.callbacks.metrics import Metrics
from recipes.training.callbacks.steps import at_step_boundary
from recipes.training.callbacks.watchdog import Watchdog
from recipes.training.processes.ranks import mean
from sinkmodel.console import say
from sinkmodel.perplexity import perplexity


class Validation(Callback):
    """Logs the mean nll of validation rows over the targets that a twin shares: every `every` steps, and at the end."""

    def __init__(self, every: int, metrics: Metrics, watchdog: Watchdog):
        self.every, self.metrics, self.watchdog = every, metrics, watchdog

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if at_step_boundary(trainer, batch_idx) and (step % self.every == 0 or step == trainer.max_steps):
            self.validate(trainer, pl_module)

    @torch.no_grad()
    def validate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = trainer.datamodule.validation_batches(trainer.global_rank)
        if own is None:
            return
        start = time.perf_counter()
        total = torch.zeros((), device=pl_module.device, dtype=torch.float64)
        with trainer.precision_plugin.forward_context():
            for batch, count in zip(*own):
                self.watchdog.moved()
                total += pl_module(*trainer.strategy.batch_to_device(batch))[1] * count
        loss = mean(total).item() * trainer.world_size / trainer.datamodule.validation_rows
        tokens = trainer.global_step * self.metrics.tokens_per_step
        for logger in trainer.loggers:
            logger.log_metrics({"tokens": tokens, "val_loss": loss, "val_ppl": perplexity(loss)}, trainer.global_step)
        if trainer.is_global_zero:
            with tqdm.external_write_mode(file=sys.stderr):  # hides the bar while the line is printed
                say(f"step {trainer.global_step}: validation loss {loss:.4f}, ppl {perplexity(loss):.2f}")
        self.metrics.exclude(time.perf_counter() - start)
