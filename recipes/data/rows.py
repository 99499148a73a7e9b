"""Training rows from text tokens. The sink is in front and never a target; twins read the same text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from recipes.data.order import row_at
from recipes.data.shards import TokenSplit
from sinkmodel.errors import UserError

IGNORE = -100  # the target at a position that is not scored


def make_row(text: np.ndarray, sink_ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, each [T], from T + 1 text tokens x0 … xT.

    Without a sink, `[x0 … x(T-1)]` predicts `x1 … xT`. With n sinks the inputs are `[s1 … sn, x0 … x(T-n-1)]`. The last
    sink predicts x0 and the sinks before it predict nothing, so that no sink is ever a target (DESIGN.md, "Twins
    read the same text").
    """
    length, sinks = len(text) - 1, len(sink_ids)
    if sinks == 0:
        return text[:-1], text[1:]
    inputs = np.concatenate([np.asarray(sink_ids, dtype=text.dtype), text[: length - sinks]])
    targets = np.concatenate([np.full(sinks - 1, IGNORE, dtype=text.dtype), text[: length - sinks + 1]])
    return inputs, targets


def twin_targets(length: int, sinks: int) -> slice:
    """The positions of a row whose targets a twin has too.

    A vanilla row and its twin with one sink share x1 … x(T-1). Only the vanilla row has its last target, xT. Only the
    sink row has its first, x0, predicted from the sink alone. With n sinks a row has n - 1 targets less.
    """
    return slice(0, length - 1) if sinks == 0 else slice(sinks, length)


@dataclass(frozen=True)
class RowLayout:
    """The rows of one split: row i starts at token `i * stride`."""

    split: TokenSplit
    sequence: int

    @property
    def stride(self) -> int:
        return self.split.row_tokens or self.sequence

    @property
    def rows(self) -> int:
        if self.split.row_tokens:
            return self.split.tokens // self.split.row_tokens
        return max(0, (self.split.tokens - 1) // self.sequence)

    def check(self, what: str) -> None:
        """Raises UserError if the split `what` has not a single row."""
        if self.split.row_tokens and self.sequence + 1 > self.split.row_tokens:
            raise UserError(
                f"data.sequence is {self.sequence}, but the pre-shuffled rows have {self.split.row_tokens} tokens; "
                f"set it to {self.split.row_tokens - 1} or less"
            )
        if self.rows == 0:
            raise UserError(
                f"the {what} split has {self.split.tokens} tokens, less than one row of data.sequence = "
                f"{self.sequence}; prepare more text or take a shorter sequence"
            )

    def read(self, row: int) -> np.ndarray:
        """Text tokens x0 … xT of a row, [T + 1]."""
        return self.split.read(row * self.stride, self.sequence + 1)


class Samples(Dataset):
    """Sample n is the n-th row trained on, after `skip` others: inputs and targets, each int64 [T]."""

    def __init__(self, layout: RowLayout, sink_ids: list[int], seed: int, shuffle: bool, skip: int = 0):
        self.layout, self.sink_ids, self.seed, self.shuffle, self.skip = layout, sink_ids, seed, shuffle, skip

    def row(self, sample: int) -> int:
        return row_at(self.skip + sample, self.layout.rows, self.seed, self.shuffle)

    def __getitem__(self, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = make_row(self.layout.read(self.row(sample)), self.sink_ids)
        return torch.from_numpy(inputs), torch.from_numpy(targets)
