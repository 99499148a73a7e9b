"""The pictures of a report. Colours are Okabe and Ito's, which the colour-blind can tell apart."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLUMNS = 2


def draw(path: Path, curves: dict[str, list], measured: list[dict[str, Any]]) -> None:
    """One panel with the loss curves, then one a model with its perplexity by position, two in a row."""
    panels = bool(curves) + len(measured)
    columns = min(COLUMNS, panels)
    lines = -(-panels // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6.4 * columns, 4 * lines), squeeze=False, layout="constrained")
    rest = list(axes.flat)
    if curves:
        draw_losses(rest.pop(0), curves)
    for content in measured:
        draw_positions(rest.pop(0), content)
    for axis in rest:
        axis.set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_losses(axis: Axes, curves: dict[str, list]) -> None:
    """Training loss as a line, validation loss as points, over tokens; on the targets that twins share."""
    for colour, width, (name, points) in zip(itertools.cycle(COLOURS), _widths(len(curves)), curves.items()):
        train = [(tokens, loss) for _, tokens, loss, _ in points if loss is not None]
        validation = [(tokens, loss) for _, tokens, _, loss in points if loss is not None]
        axis.plot(*zip(*train), color=colour, linewidth=width, label=f"{name}, training")
        if validation:
            size = 2 + 2 * width
            axis.plot(*zip(*validation), "o", color=colour, markersize=size, label=f"{name}, validation")
    axis.set(title="Loss of the twins", xlabel="tokens", ylabel="nats per token")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M")
    _finish(axis)


def draw_positions(axis: Axes, content: dict[str, Any]) -> None:
    """Perplexity by place in the stream, one line a policy, with the first overflow marked."""
    rows = content["rows"]
    for colour, width, row in zip(itertools.cycle(COLOURS), _widths(len(rows)), rows):
        places = [(first + last) / 2 for first, last, _ in row["by_position"]]
        perplexities = [math.exp(min(nll, 700)) for _, _, nll in row["by_position"]]
        short = f"{row['sinks']}+{row['window']}" if row["policy"] in ("window", "sink") else None
        axis.plot(places, perplexities, color=colour, linewidth=width, label=short or row.get("label", row["policy"]))
    axis.axvline(content["budget"], color="grey", linestyle=":", linewidth=1)
    axis.annotate(
        "first eviction",
        (content["budget"], 0),
        xycoords=("data", "axes fraction"),
        xytext=(3, 4),
        textcoords="offset points",
        fontsize=8,
        color="grey",
    )
    axis.set(title=f"{Path(content['model']).name}, budget {content['budget']}", xlabel="place in the stream")
    axis.set(ylabel="perplexity", yscale="log")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks(lambda value, _: f"{value:g}")
    axis.tick_params(axis="y", which="minor", labelsize=7)
    _finish(axis)


def draw_latency(path: Path, content: dict[str, Any]) -> None:
    """Milliseconds a token over the budget, one line a policy; beside it, if measured, along the stream, from zero."""
    panels = 1 + bool(content["stream"])
    figure, axes = plt.subplots(1, panels, figsize=(6.4 * panels, 4), squeeze=False, layout="constrained")
    first = axes[0, 0]
    first.set(title=f"A decoding step, {Path(content['model']).name}", xlabel="keys that a query sees")
    first.set(xscale="log", yscale="log")
    first.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    _draw_times(first, content["rows"], "budget", "policy")
    first.set_xticks(sorted({row["budget"] for row in content["rows"]}))
    if content["stream"]:
        second = axes[0, 1]
        second.set(title="Along a stream", xlabel="tokens seen")
        _draw_times(second, content["stream"], "seen", "label")
        second.set_ylim(bottom=0)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def _draw_times(axis: Axes, rows: list[dict[str, Any]], x: str, line: str) -> None:
    """ms a token over row[x], one line for each row[line], with its p99 dotted."""
    for colour, name in zip(itertools.cycle(COLOURS), dict.fromkeys(row[line] for row in rows)):
        points = [(row[x], row["ms_per_token"], row["ms_per_token_p99"]) for row in rows if row[line] == name]
        places, middle, slowest = zip(*points)
        axis.plot(places, middle, "o-", color=colour, markersize=4, label=name)
        axis.plot(places, slowest, ":", color=colour, linewidth=1)
    axis.set(ylabel="ms a token (dotted: p99)")
    axis.minorticks_off()
    for ticks in (axis.xaxis.set_major_formatter, axis.yaxis.set_major_formatter):
        ticks(lambda value, _: f"{value:,.10g}")
    _finish(axis)


def _widths(count: int) -> list[float]:
    """The first line broad, the last one thin: lines that lie on each other all show."""
    return [1.0 + 2.5 * (count - 1 - i) / max(1, count - 1) for i in range(count)]


def _finish(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.15)
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper right")
