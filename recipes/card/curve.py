"""The loss curve of one run, for a card without a report: training loss as a line, held-out loss as hollow marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recipes.card.facts import Point
from recipes.card.rows import last_of

PATH = "figures/loss.png"


def lines_of(points: Sequence[Point]) -> dict[str, list[tuple[float, float]]]:
    """(tokens, nats per token) of each measured loss. A point without tokens takes those of the point before it."""
    lines: dict[str, list[tuple[float, float]]] = {}
    tokens = 0.0
    for point in points:
        tokens = point.get("tokens") or tokens
        for name, column in (("training", "twin_loss"), ("held out", "val_loss")):
            value = point.get(column)
            if value is not None:
                lines.setdefault(name, []).append((tokens, value))
    return lines


def alternative(points: Sequence[Point]) -> str:
    """The figure's alternative text."""
    ends = {"training": last_of(points, "twin_loss"), "held-out": last_of(points, "val_loss")}
    losses = " and ".join(f"{name} loss {value:.3f}" for name, value in ends.items() if value is not None)
    return f"Loss over tokens; at the end {losses} nats per token"


def draw(path: Path, points: Sequence[Point]) -> None:
    """Draw the curve. The same points give the same bytes, so that a push finds no change."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9.5}):
        figure = Figure(figsize=(5.0, 3.1), layout="constrained")
        axis = figure.add_subplot()
        for (name, line), style in zip(lines_of(points).items(), ("-", "o")):
            axis.plot(*zip(*line), style, label=name, color="#0072B2", markerfacecolor="none", linewidth=1.4)
        axis.set(xlabel="tokens", ylabel="nats per token")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(True, alpha=0.3)
        axis.legend(frameon=False)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=160, format="png", facecolor="white", metadata={"Software": None})
