"""Stops a run on a signal: at a step boundary, on all ranks, after saving; and returns its job to SLURM's queue."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from recipes.training.callbacks.checkpoints import BackgroundCheckpointIO
from recipes.training.callbacks.steps import at_step_boundary
from recipes.training.processes import signals
from sinkmodel.console import say
from sinkmodel.errors import UserError


class StopOnSignal(Callback):
    """Sets `trainer.should_stop` at a step boundary, at the same step on all ranks, before `Checkpoints` reads it.

    The ranks exchange their signals in an all-reduce on the CPU during the next step, so that no step waits for it. So
    they stop one step later than a single process would. The same all-reduce reports that rank 0 could not write a
    checkpoint.
    """

    def __init__(self, io: BackgroundCheckpointIO) -> None:
        self.agreed: int | None = None
        self._io = io
        self._flags = torch.zeros(2, dtype=torch.int64)  # the signal received, whether a checkpoint failed
        self._exchange: dist.Work | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signals.training = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not at_step_boundary(trainer, batch_idx):
            return
        if trainer.world_size > 1 and self._exchange is not None:
            self._exchange.wait()
            self._act(*self._flags.tolist())
        own = (signals.received or 0, self._io.failed)
        if trainer.world_size > 1:
            self._flags.copy_(torch.tensor(own))
            self._exchange = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, async_op=True)
        else:
            self._act(*own)
        if self.agreed is not None:
            if signals.received is None:
                say(f"{signal.Signals(self.agreed).name} came to another rank: saving at the end of this step")
            trainer.should_stop = True

    def _act(self, number: int, failed: int) -> None:
        self.agreed = number or None
        if failed:
            self._io.finish()  # raises on rank 0
            raise UserError("rank 0 could not write a checkpoint")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._exchange is not None:
            self._exchange.wait()


def requeue() -> None:
    """Return this job to SLURM's queue, which runs its script again. Does nothing outside of a job."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    try:
        ask = functools.partial(subprocess.run, capture_output=True, encoding="utf-8", errors="replace", timeout=60)
        shown = ask(["scontrol", "show", "job", job])
        state = re.search(r"JobState=(\w+)", shown.stdout)
        if state and state[1] != "RUNNING":
            say(f"job {job} is {state[1]}: it is not returned to the queue")
            return
        done = ask(["scontrol", "requeue", job])
    except (OSError, subprocess.TimeoutExpired) as error:
        say(f"job {job} could not be returned to the queue ({error}); submit it again: it resumes where it stopped")
        return
    if done.returncode:
        why = done.stderr.strip() or f"exit code {done.returncode}"
        say(f"job {job} could not be returned to the queue ({why}); submit it again: it resumes where it stopped")
    else:
        say(f"job {job} is back in the queue; it resumes where it stopped")
