"""Training: the loss curves of twins, and where their attention goes during training."""

from __future__ import annotations

import functools
from typing import Any

from eval.report.blocks import Chart, Section, Table, figure
from eval.report.charts import panels
from eval.report.inputs import Inputs, Run
from eval.report.plots import paint_losses, paint_over_tokens
from sinkmodel.sink_metric import COLUMNS, OLD_COLUMNS, OLD_DEFINITION

OF_LOSS = ("step", "tokens", "twin_loss", "val_loss")


def section(inputs: Inputs) -> Section | None:
    runs = inputs.runs
    if not runs:
        return None
    training, validation = ({run.name: _line(run, of) for run in runs} for of in ("twin_loss", "val_loss"))
    alt = "Loss over tokens, training and held out; at the end " + "; ".join(map(_end, runs))
    painted = [(alt, functools.partial(paint_losses, training=training, validation=validation))]
    of_sinks = {}
    for column, label in {**COLUMNS, **OLD_COLUMNS}.items():
        lines = {run.name: line for run in runs if (line := _line(run, column))}
        if lines:
            of_sinks[column] = label
            ends = "; ".join(f"{name} {figure(line[-1][1], '.3f')}" for name, line in lines.items())
            alt = f"{label[0].upper()}{label[1:]} over tokens; at the end {ends}"
            painted.append((alt, functools.partial(paint_over_tokens, lines=lines, label=label)))
    columns = [*OF_LOSS, *of_sinks]
    numbers = [[run.name, *(_written(point.get(column)) for column in columns)] for run in runs for point in run.points]
    caption = "Loss of the twins on the targets that both have."
    if of_sinks.keys() & OLD_COLUMNS:
        caption += f" Runs of earlier versions have an {OLD_DEFINITION}."
    chart = Chart("training", panels(painted), ["run", *columns], numbers, caption)
    table = Table(
        ["run", "steps", "tokens", "training loss", "held-out loss", *of_sinks.values()],
        [
            [
                run.name,
                f"{max(point['step'] or 0 for point in run.points):,.0f}",
                f"{max(point['tokens'] or 0 for point in run.points):,.0f}",
                *(figure(_last(run, column), ".4f") for column in ("twin_loss", "val_loss")),
                *(figure(_last(run, column), ".3f") for column in of_sinks),
            ]
            for run in runs
        ],
        caption="The last values, in nats per token and as shares. Training loss is that of the last batches.",
    )
    return Section("training", "Training of the twins", [chart, table])


def _line(run: Run, column: str) -> list[tuple[float, float | None]]:
    """(tokens, value) for each point that has a value."""
    return [(point["tokens"] or 0, point[column]) for point in run.points if point.get(column) is not None]


def _last(run: Run, column: str) -> float | None:
    return next((y for _, y in reversed(_line(run, column))), None)


def _end(run: Run) -> str:
    return f"{run.name} {figure(_last(run, 'twin_loss'), '.3f')} and {figure(_last(run, 'val_loss'), '.3f')} nats"


def _written(value: float | None) -> Any:
    """Whole numbers, such as steps and tokens, without a decimal point."""
    return int(value) if value is not None and value == int(value) else value
