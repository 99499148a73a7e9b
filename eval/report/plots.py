"""The pictures of a report. Colours are Okabe and Ito's, which the colour-blind can tell apart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw(path: Path, curves: dict[str, list], measured: list[dict[str, Any]]) -> None:
    """One row of panels: the loss curves first, then perplexity by position for each model."""
    panels = bool(curves) + len(measured)
    figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 4.2), squeeze=False, layout="constrained")
    rest = list(axes[0])
    if curves:
        draw_losses(rest.pop(0), curves)
    for axis, content in zip(rest, measured):
        draw_positions(axis, content)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_losses(axis: Axes, curves: dict[str, list]) -> None:
    """Training loss as a line, validation loss as points, over tokens; on the targets that twins share."""
    for colour, (name, points) in zip(COLOURS, curves.items()):
        train = [(tokens, loss) for _, tokens, loss, _ in points if loss is not None]
        validation = [(tokens, loss) for _, tokens, _, loss in points if loss is not None]
        axis.plot(*zip(*train), color=colour, linewidth=1.2, label=f"{name}, training")
        if validation:
            axis.plot(*zip(*validation), "o", color=colour, markersize=4, label=f"{name}, validation")
    axis.set(title="Loss of the twins", xlabel="tokens", ylabel="nats per token")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M")
    _finish(axis)


def draw_positions(axis: Axes, content: dict[str, Any]) -> None:
    """Perplexity by place in the stream, one line a policy, with the first overflow marked."""
    for colour, row in zip(COLOURS, content["rows"]):
        places = [(first + last) / 2 for first, last, _ in row["by_position"]]
        perplexities = [math.exp(min(nll, 700)) for _, _, nll in row["by_position"]]
        name = "dense" if row["policy"] == "dense" else f"{row['sinks']}+{row['window']}"
        axis.plot(places, perplexities, color=colour, linewidth=1.2, label=name)
    axis.axvline(content["budget"], color="grey", linestyle=":", linewidth=1)
    axis.annotate("overflow", (content["budget"], 1), xycoords=("data", "axes fraction"), xytext=(3, -10),
                  textcoords="offset points", fontsize=8, color="grey")  # fmt: skip
    axis.set(title=f"{Path(content['model']).name}, C = {content['budget']}", xlabel="place in the stream")
    axis.set(ylabel="perplexity", yscale="log")
    _finish(axis)


def _finish(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
