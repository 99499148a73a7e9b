"""The LightningDataModule. Batches are computed from one number, the samples consumed so far."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Sampler

from recipes.data.rows import RowLayout, Samples
from recipes.data.shards import TokenSplit
from sinkmodel.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """How the rows of one optimiser step are divided: `rows` = `accumulation` × `ranks` × `micro_rows`."""

    rows: int
    micro_rows: int
    ranks: int

    @property
    def accumulation(self) -> int:
        return self.rows // (self.micro_rows * self.ranks)

    def first_sample(self, micro_batch: int, rank: int) -> int:
        """Number of the first sample of this rank's `micro_batch`-th micro-batch, counted from 0 over the run."""
        return (micro_batch * self.ranks + rank) * self.micro_rows


def plan_batches(batch_tokens: int, sequence: int, micro_rows: int, ranks: int) -> BatchPlan:
    """Derive the accumulation from the batch in tokens. Raises UserError if the batch does not divide evenly."""
    if batch_tokens < sequence or batch_tokens % sequence:
        near = max(1, round(batch_tokens / sequence)) * sequence
        raise UserError(
            f"training.batch_tokens is {batch_tokens}, not a multiple of data.sequence = {sequence}; {near} would do"
        )
    rows = batch_tokens // sequence
    if rows % (micro_rows * ranks):
        fitting = [m for m in range(1, rows // ranks + 1) if rows % (m * ranks) == 0]
        near = max(1, round(rows / ranks)) * ranks
        remedy = (
            f"training.micro_rows = {min(fitting, key=lambda m: abs(m - micro_rows))} would do"
            if fitting
            else f"training.batch_tokens = {near * sequence} ({near} rows) would do"
        )
        raise UserError(
            f"a batch of {rows} rows (training.batch_tokens / data.sequence) does not divide into micro-batches of "
            f"training.micro_rows = {micro_rows} on {ranks} process(es); {remedy}"
        )
    return BatchPlan(rows, micro_rows, ranks)


class MicroBatches(Sampler[list[int]]):
    """Sample numbers of each micro-batch of one rank, from the first remaining optimiser step to the last."""

    def __init__(self, plan: BatchPlan, steps: int, rank: int, consumed: int = 0):
        self.plan, self.steps, self.rank, self.consumed = plan, steps, rank, consumed
        self.batch_size = plan.micro_rows  # Lightning's DeepSpeed strategy reads it

    def __len__(self) -> int:
        """Number of micro-batches of the whole run, even if it is resumed: Lightning continues its old count."""
        return self.steps * self.plan.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for micro_batch in range(self.consumed // (self.plan.micro_rows * self.plan.ranks), len(self)):
            first = self.plan.first_sample(micro_batch, self.rank)
            yield list(range(first, first + self.plan.micro_rows))


def leave_signals_to_the_parent(worker: int) -> None:
    """Ignore signals in a process that reads ahead: a Ctrl-C reaches it too, but the last step still needs it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class TextDataModule(LightningDataModule):
    """Rows of one prepared folder. Its state is the number of samples consumed, and the settings that fix their order.

    Args:
        train: the training split of the prepared folder.
        validation: the validation split, or None.
        sink_ids: token ids in front of every row; empty for a vanilla model.
        sequence: length T of a row in tokens, sinks included.
        steps: optimiser steps of the whole run.
        validation_rows: number of rows to score, from the start of the validation split.
        workers: number of processes that read ahead; 0 reads in this process.
        skip: number of rows of the training split, in training order, before the first row read.
    """

    def __init__(
        self,
        train: TokenSplit,
        validation: TokenSplit | None,
        sink_ids: list[int],
        sequence: int,
        plan: BatchPlan,
        steps: int,
        seed: int,
        shuffle: bool,
        validation_rows: int,
        workers: int,
        skip: int = 0,
    ):
        super().__init__()
        layout = RowLayout(train, sequence)
        layout.check("train")
        if train.row_tokens:
            shuffle = False  # the rows are shuffled already, in Pythia's order
        self.samples = Samples(layout, sink_ids, seed, shuffle, skip)
        self.validation: Samples | None = None
        self.validation_rows = 0
        if validation is not None:
            held_out = RowLayout(validation, sequence)
            held_out.check("validation")
            self.validation = Samples(held_out, sink_ids, seed, shuffle=False)
            self.validation_rows = min(validation_rows, held_out.rows)
            for row in range(self.validation_rows):  # raises before training if an id is not in the vocabulary
                held_out.read(row)
        self.plan, self.steps, self.workers = plan, steps, workers
        self.consumed = 0
        self.identity: dict[str, Any] = {
            "fingerprint": train.fingerprint,
            "sequence": sequence,
            "seed": seed,
            "shuffle": shuffle,
            "batch_rows": plan.rows,
            "skip": skip,
        }

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"samples": self.trainer.global_step * self.plan.rows, **self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError if the checkpoint was trained on other data or in another order."""
        for key, here in self.identity.items():
            if state.get(key, 0) != here:  # checkpoints of earlier versions have no `skip`
                raise UserError(
                    f"the checkpoint was trained with data {key} {state.get(key)}, this run has {here}; "
                    "resume with the same data and settings, or start in a new output folder"
                )
        self.consumed = state["samples"]

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        batches = MicroBatches(self.plan, self.steps, self.trainer.global_rank, self.consumed)
        return self._loader(self.samples, batches, persistent=self.workers > 0)

    def validation_batches(self, rank: int) -> tuple[DataLoader, list[int]] | None:
        """This rank's micro-batches of validation rows, and how many rows of each count; None without a split.

        All ranks get the same number of micro-batches, since some strategies need all ranks in every forward. If a rank
        has too few rows, it gets the first ones again, and these count 0.
        """
        if self.validation is None:
            return None
        size, rows = self.plan.micro_rows, list(range(self.validation_rows))
        batches = [rows[i : i + size] for i in range(rank * size, len(rows), size * self.plan.ranks)]
        counts = [len(batch) for batch in batches]
        missing = -(-len(rows) // (size * self.plan.ranks)) - len(batches)
        return self._loader(self.validation, batches + [rows[:size]] * missing), counts + [0] * missing

    def rows_of(self, step: int) -> list[int]:
        """The rows of the training split that optimiser step `step`, counted from 1, reads."""
        numbers = range((step - 1) * self.plan.rows, step * self.plan.rows)
        return [self.samples.row(number) for number in numbers]

    def first_row_of(self, step: int) -> torch.Tensor:
        """Inputs [T] of the first row that a step reads: the same one on every rank."""
        return self.samples[(step - 1) * self.plan.rows][0]

    def _loader(self, samples: Samples, batches: Any, persistent: bool = False) -> DataLoader:
        """Workers of training persist, so that Lightning ends them after an error: they ignore SIGTERM."""
        return DataLoader(
            samples,
            batch_sampler=batches,
            num_workers=self.workers,
            persistent_workers=persistent,
            worker_init_fn=leave_signals_to_the_parent,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )
