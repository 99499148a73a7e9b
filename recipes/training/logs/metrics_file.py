"""`metrics.csv`: every logged number of a run, in one file that a resume continues."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from sinkmodel.checkpoint import read_metrics
from sinkmodel.files import atomic_file
from sinkmodel.sink_metric import old_columns

COLUMNS = (
    "step",
    "tokens",
    "loss",
    "ppl",
    "twin_loss",
    "lr",
    "grad_norm",
    "sink_alpha",
    "sink_metric",
    "tokens_per_second",
    "mfu",
    "val_loss",
    "val_ppl",
)


class MetricsFile(Logger):
    """Writes one line per call, in full precision and at once. Every run has it; all other loggers are copies of it.

    Lightning's CSVLogger starts a new file on resume. This one drops only the lines after the step resumed from, so
    that a killed run leaves the same file as an uninterrupted one.
    """

    def __init__(self, path: Path, columns: Sequence[str] = COLUMNS):
        super().__init__()
        self.path, self.columns = path, columns

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Keep only the complete lines up to `step`: a line that a kill cut short is dropped too.

        The columns of an earlier version stay, after ours, and are empty from here on.
        """
        lines = [row for row in read_metrics(self.path.parent) if int(row["step"]) <= step]
        if lines:
            self.columns = (*self.columns, *old_columns(name for name in lines[0] if name not in self.columns))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        with atomic_file(self.path) as aside:
            aside.write_text(buffer.getvalue(), encoding="utf-8")

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow({"step": step, **metrics})

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to log: config.yaml holds the config."""
