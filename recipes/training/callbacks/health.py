"""Ends a run whose loss, gradient or weights are not finite, before it saves them; reports spikes of the loss."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from recipes.training.callbacks.steps import StepMeans, at_step_boundary
from sinkmodel.checkpoint import checkpoint_steps
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.files import atomic_file

MOST_ROWS = 32  # row numbers in a message; spikes.csv has all of them


@dataclass
class RunningLoss:
    """Mean and variance of the loss over about the last 1 / (1 - DECAY) steps."""

    mean: float = 0.0
    variance: float = 0.0
    steps: int = 0

    DECAY = 0.98
    WARMUP = 100  # steps before anything counts as a spike

    def spike(self, loss: float, deviations: float) -> bool:
        """Whether `loss` is more than `deviations` standard deviations above the mean; if not, update both with it."""
        above = loss - self.mean
        if self.steps >= self.WARMUP and above > deviations * math.sqrt(self.variance):
            self.steps += 1
            return True
        share = max(1 - self.DECAY, 1 / (self.steps + 1))
        self.variance = (1 - share) * (self.variance + share * above * above)
        self.mean += share * above
        self.steps += 1
        return False


class Health(Callback):
    """Keeps loss and gradient norm of every step on the device, and checks them when a line is logged or a step saved.

    All ranks have the same numbers, so all of them stop together. Spikes go to `RUN/spikes.csv`, with their rows.

    Args:
        rows_of: returns the rows that a step reads; steps are counted from 1.
        spike: standard deviations above the running mean from which a loss is a spike.
    """

    def __init__(self, run: Path, means: StepMeans, rows_of: Callable[[int], list[int]], spike: float):
        self.run, self.means, self.rows_of, self.spike = run, means, rows_of, spike
        self.running = RunningLoss()
        self.settle: Callable[[], None] = lambda: None  # waits until the checkpoint being written is complete
        self.unseen: list[torch.Tensor] = []  # on the device: loss and gradient norm of each step since `look`, [2]

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.running)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.running = RunningLoss(**state_dict)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._rewind(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_step_boundary(trainer, batch_idx):
            self.unseen.append(torch.stack([self.means.losses[0], self.means.grad_norm]))

    def look(self, trainer: Trainer) -> None:
        """Check the steps since the last look. Waits for the device. UserError (exit code 1) if any is not finite."""
        if not self.unseen:
            return
        first = trainer.global_step - len(self.unseen) + 1
        for step, (loss, norm) in enumerate(torch.stack(self.unseen).tolist(), start=first):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.stop(f"the loss or gradient of step {step} is not finite", step)
            expected = self.running.mean
            if self.running.spike(loss, self.spike):
                self._report(trainer, step, loss, expected)
        self.unseen = []

    def stop_if_weights_are_not_finite(self, pl_module: LightningModule) -> None:
        """Called before saving, as such a checkpoint is useless. Waits for the device. One rank's weights stop all."""
        step = pl_module.trainer.global_step
        trained = [_local(parameter) for parameter in pl_module.parameters() if parameter.requires_grad]
        finite = torch.stack([part.isfinite().all() for part in trained]).all()
        if pl_module.trainer.strategy.reduce(finite.float(), reduce_op="sum") != pl_module.trainer.world_size:
            self.stop(f"the weights after step {step} are not finite", step)

    def stop(self, what: str, step: int) -> None:
        self.settle()
        good = [path for saved, path in checkpoint_steps(self.run).items() if saved < step]
        last = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint was written before it"
        raise UserError(
            f"{what}; it read rows {_some(self.rows_of(step))}; {last}; lower optimizer.lr or raise schedule.warmup, "
            "and start in a new output folder",
            exit_code=1,
        )

    def _report(self, trainer: Trainer, step: int, loss: float, expected: float) -> None:
        rows = self.rows_of(step)
        say(f"step {step}: the loss jumped to {loss:.3f} from about {expected:.3f}; it read rows {_some(rows)}")
        if trainer.is_global_zero:
            path = self._file()
            with path.open("a", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow([step, loss, expected, " ".join(map(str, rows))])

    def _file(self) -> Path:
        path = self.run / "spikes.csv"
        if not path.exists():
            path.write_text("step,loss,expected,rows\n", encoding="utf-8")
        return path

    def _rewind(self, step: int) -> None:
        """Drop the lines after `step`, whose steps are repeated, and a line that a kill cut short."""
        path = self.run / "spikes.csv"
        if not path.exists():
            return
        header, *lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if "\n" in line]
        kept = [line for line in lines if int(line.partition(",")[0]) <= step]
        with atomic_file(path) as aside:
            aside.write_text("".join([header, *kept]), encoding="utf-8")


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """The part of a parameter on this rank: all of it, or its shard (FSDP2, ZeRO-3)."""
    return parameter.to_local() if hasattr(parameter, "to_local") else getattr(parameter, "ds_tensor", parameter)


def _some(rows: list[int]) -> str:
    more = f" and {len(rows) - MOST_ROWS} more" if len(rows) > MOST_ROWS else ""
    return ", ".join(map(str, rows[:MOST_ROWS])) + more
