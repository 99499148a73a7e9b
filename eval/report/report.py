"""`sink-eval report`: the loss curves of runs and their perplexity by position, as one picture with its numbers."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.files import atomic_folder, read_json

DESCRIPTION = "Draw the loss curves of training runs and the perplexity by position that `sink-eval ppl` measured."
Point = tuple[int, int, "float | None", "float | None"]  # step, tokens, twin_loss, val_loss
ROW = {"policy", "sinks", "window", "by_position"}  # keys of a row of sink-eval ppl --json that are drawn
EXAMPLE = "sink-eval report --runs runs/vanilla runs/sink --ppl vanilla.json sink.json --output runs/report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", nargs="+", type=Path, default=[], metavar="RUN", help="folders of sink-pretrain")
    parser.add_argument(
        "--ppl", nargs="+", type=Path, default=[], metavar="FILE", help="what sink-eval ppl --json wrote"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to make")


def run(options: argparse.Namespace) -> None:
    """Write `report.png`, `loss.csv` and `positions.csv`. Raises UserError for a file that is not what it should be."""
    if not options.runs and not options.ppl:
        raise UserError("nothing to draw; give --runs, --ppl or both")
    curves = dict(zip(labels(options.runs), map(read_losses, options.runs)))
    measured = [read_ppl(file) for file in options.ppl]
    from eval.report.plots import draw

    with atomic_folder(options.output) as folder:
        if curves:
            write_csv(
                folder / "loss.csv",
                ["run", "step", "tokens", "twin_loss", "val_loss"],
                [[name, *point] for name, points in curves.items() for point in points],
            )
        if measured:
            write_csv(
                folder / "positions.csv",
                ["model", "policy", "sinks", "window", "first", "last", "nll"],
                [
                    [content["model"], row["policy"], row["sinks"], row["window"], *bin_]
                    for content in measured
                    for row in content["rows"]
                    for bin_ in row["by_position"]
                ],
            )
        draw(folder / "report.png", curves, measured)
    say(f"wrote {options.output / 'report.png'}")


def labels(runs: list[Path]) -> list[str]:
    """The names of the run folders; their paths where two have one name."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def read_losses(run: Path) -> list[Point]:
    """The losses that twins share, of a run's metrics.csv: training, and validation where it was measured."""
    from sinkmodel.checkpoint import read_metrics

    rows = read_metrics(run)
    if not rows:
        raise UserError(f"{run} has no metrics.csv with a line in it; give the folder of a run of sink-pretrain")
    return [(int(row["step"]), int(row["tokens"]), _loss(row["twin_loss"]), _loss(row["val_loss"])) for row in rows]


def _loss(text: str) -> float | None:
    return float(text) if text else None


def read_ppl(path: Path) -> dict[str, Any]:
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) and content.get("command") == "ppl" else None
    if not rows or not {"model", "budget"} <= content.keys() or not all(row.keys() >= ROW for row in rows):
        raise UserError(f"{path} is not a result of sink-eval ppl --json")
    return content


def write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
