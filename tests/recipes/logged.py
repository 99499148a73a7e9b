"""Reads the lines of a run from metrics.csv, from wandb's files and from TensorBoard's."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from recipes.training.logs.wandb_files import files_of, history, records
from sinkmodel.checkpoint import checkpoint_steps, read_metrics
from tests.recipes.wandb_server import ServerRun


def curves(run: Path) -> list[dict[str, float]]:
    """metrics.csv with a step's lines in one, as wandb has them."""
    merged: dict[str, dict[str, float]] = {}
    for line in read_metrics(run):
        merged.setdefault(line["step"], {}).update({key: float(text) for key, text in line.items() if text})
    return list(merged.values())


def expected_points(run: Path) -> dict[str, list[tuple[int, float]]]:
    lines = curves(run)
    names = {name for line in lines for name in line} - {"step"}
    return {name: [(line["step"], pytest.approx(line[name])) for line in lines if name in line] for name in names}


def points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve in the folder as a reader finds it that knows nothing of purging."""
    folder = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    folder.Reload()
    return {tag: [(event.step, event.value) for event in folder.Scalars(tag)] for tag in folder.Tags()["scalars"]}


def forget(run: Path, above: int) -> None:
    """Leave the run as a kill does: lines and curves have steps after its last checkpoint."""
    for step, path in checkpoint_steps(run).items():
        if step > above:
            path.unlink()


def logged_steps(run: Path) -> list[int]:
    """The steps in all of the run's offline folders, as often as they are there."""
    (identity,) = {path.stem.removeprefix("run-") for path in (run / "wandb").glob("offline-run-*/*.wandb")}
    return sorted(step for path in files_of(run, identity) for step, _ in history(path))


def records_of(run: Path, kind: str) -> list:
    """The records of one kind in the run's newest wandb file."""
    content = max((run / "wandb").glob("offline-run-*/*.wandb")).read_bytes()
    found = [Record.FromString(record) for record, _ in records(content)]
    return [getattr(record, kind) for record in found if record.HasField(kind)]


def uploaded(held: ServerRun) -> list[dict[str, float]]:
    """The history that a server has, without wandb's own numbers."""
    return [{"step": row["_step"], **{k: row[k] for k in row if not k.startswith("_")}} for row in held.history]
