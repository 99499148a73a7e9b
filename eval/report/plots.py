"""The kinds of figures in a report: each function paints one of them on an Axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.report.blocks import LONGEST, stream_name
from eval.report.charts import (
    COLOURS,
    GRID,
    INK,
    MARKERS,
    SIZE,
    STYLE,
    draw_lines,
    look,
    plain,
    scale_values,
    shown,
    ticks_at,
    tokens_axis,
)
from sinkmodel.perplexity import perplexity
from sinkmodel.results.attention import LayerRow
from sinkmodel.results.latency import LatencyResult, LatencyRow, StreamRow
from sinkmodel.results.memories import MemoriesResult
from sinkmodel.results.perplexity import PerplexityResult
from sinkmodel.results.verdict import Comparison

Lines = dict[str, list[tuple[float, "float | None"]]]
DODGE = 0.025  # shift between lines, as a fraction of a step of the x axis, so that their intervals do not overlap
SHADE: dict[str, Any] = {"color": COLOURS[5], "alpha": 0.22, "linewidth": 0}


def paint_intervals(axis: Axes, rows: Sequence[tuple[str, Comparison]], margin: float) -> None:
    """Paired differences as intervals, with the ±margin shaded; the first interval is the verdict and thicker."""
    axis.axvspan(-margin, margin, **SHADE)
    axis.axvline(0, color=GRID, linewidth=0.8)
    for place, (name, row) in enumerate(rows):
        colour, thick = (INK, 3.2) if place == 0 else (COLOURS[0], 1.6)
        assert row.low is not None
        assert row.high is not None
        assert row.difference is not None
        axis.plot([row.low, row.high], [-place, -place], color=colour, linewidth=thick, solid_capstyle="butt")
        axis.plot([row.difference], [-place], MARKERS[3 if place == 0 else 0], color=colour, markersize=6)
        label = shown(name, 2 * LONGEST) + ("" if place else ": the verdict")
        axis.annotate(label, (0.01, -place), xycoords=("axes fraction", "data"), xytext=(0, 8), fontsize=8.5,
                      textcoords="offset points", fontweight="normal" if place else "bold")  # fmt: skip
    axis.set_ylim(-len(rows) + 0.5, 0.75)
    axis.set_yticks([])
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.spines["left"].set_visible(False)
    axis.set_xlabel(f"difference in nats per token (shaded: margin of ±{margin:g})")


def paint_losses(axis: Axes, training: Lines, validation: Lines) -> None:
    """Training loss as lines and validation loss as hollow markers, on the targets that twins share."""
    draw_lines(axis, training, markers=1)
    for index, points in enumerate(validation.values()):
        known = [(x, y) for x, y in points if y is not None]
        if known:
            style = look(index)
            axis.plot(*zip(*known), style["marker"], color=style["color"], markerfacecolor="none", markersize=6)
    tokens_axis(axis)
    axis.set_ylabel("nats per token (hollow: held out)")


def paint_over_tokens(axis: Axes, lines: Lines, label: str) -> None:
    draw_lines(axis, lines)
    tokens_axis(axis)
    axis.set_ylabel(label)
    axis.set_ylim(bottom=-0.03 * axis.get_ylim()[1])  # a marker at zero is not cut off


def paint_positions(axis: Axes, content: PerplexityResult) -> None:
    """Perplexity by position in the stream, one line per policy; positions after the first eviction are shaded."""
    lines: Lines = {}
    for row in content.rows:
        name = stream_name(row)
        name = name if name not in lines else f"{row.policy} {name}"
        lines[name] = [((first + last) / 2, perplexity(nll)) for first, last, nll in row.by_position]
    draw_lines(axis, lines, markers=6)
    scale_values(axis, _values(lines))
    axis.set_ylabel("perplexity")
    end = max((last for row in content.rows for _, last, _ in row.by_position), default=0)
    if end > content.budget:
        axis.axvspan(content.budget, end, color=GRID, alpha=0.1, linewidth=0)
        axis.axvline(content.budget, color=INK, linestyle=":", linewidth=1)
        axis.annotate(
            "overflow: keys are evicted →",
            (content.budget, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -1),
            textcoords="offset points",
            va="top",
            fontsize=8.5,
        )
    axis.set_xlabel("position in the stream (tokens)")
    axis.margins(y=0.14)
    axis.xaxis.set_major_formatter(plain)


def paint_budgets(axis: Axes, lines: dict[str, list[tuple[float, float | None, float | None, float | None]]]) -> None:
    """Perplexity over budget or sinks, from (x, value, low, high), with an interval if low and high are known."""
    logarithmic = all(x > 0 for points in lines.values() for x, *_ in points)
    moved: dict[str, list[tuple[float, float | None, float | None, float | None]]] = {}
    for index, (name, points) in enumerate(lines.items()):
        shift = DODGE * (index - (len(lines) - 1) / 2)
        moved[name] = [(x * 2**shift if logarithmic else x + shift, y, low, high) for x, y, low, high in points]
    draw_lines(axis, {name: [(x, y) for x, y, _, _ in points] for name, points in moved.items()})
    for index, points in enumerate(moved.values()):
        for x, _, low, high in points:
            if low is not None and high is not None:
                axis.plot([x, x], [low, high], color=look(index)["color"], linewidth=1)
    scale_values(axis, [v for points in lines.values() for p in points for v in p[1:] if v is not None])
    axis.set_ylabel("perplexity")


def paint_heads(axis: Axes, layers: Sequence[Sequence[float | None]], head: str = "head") -> None:
    """A map of layers and their heads, with values from 0 to 1; a None is left blank."""
    most = max(map(len, layers))
    values = [[math.nan if x is None else x for x in (*row, *[None] * (most - len(row)))] for row in layers]
    image = axis.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="none")
    axis.figure.colorbar(image, ax=axis, aspect=14, shrink=0.9).outline.set_visible(False)
    axis.set(xlabel=head, ylabel="layer")
    axis.set_xticks(range(0, most, -(-most // 12)))
    axis.set_yticks(range(0, len(values), -(-len(values) // 12)))
    axis.spines[:].set_visible(False)


def paint_layers(axis: Axes, rows: Sequence[LayerRow]) -> None:
    """The shares of attention on the sink, the first text token and all the rest, by layer."""
    kinds = [kind for kind in ("sink", "first", "rest") if any(row.shares[f"{kind}_share"] is not None for row in rows)]
    draw_lines(axis, {f"on {kind}": [(row.layer, row.shares[f"{kind}_share"]) for row in rows] for kind in kinds})
    axis.set(xlabel="layer", ylabel="share of attention", ylim=(-0.03, 1.03))
    axis.set_xticks([row.layer for row in rows][:: -(-len(rows) // 12)])


def paint_births(
    axis: Axes, lines: Lines, births: Sequence[tuple[float, float] | None], thresholds: set[float]
) -> None:
    """The share of heads with a sink over training; a ring marks the birth of the sink."""
    paint_over_tokens(axis, lines, "share of heads with a sink")
    for threshold in sorted(thresholds):
        axis.axhline(threshold, color=GRID, linestyle=":", linewidth=1)
    for index, birth in enumerate(births):
        if birth is not None:
            ring: dict[str, Any] = {"markerfacecolor": "none", "markersize": 13, "markeredgewidth": 1.6}
            axis.plot(*birth, "o", color=look(index)["color"], **ring)
            axis.annotate("born", birth, xytext=(8, 7), textcoords="offset points", fontsize=8.5)


def paint_scores(axis: Axes, tasks: Sequence[str], scores: dict[str, list[tuple[float, float | None] | None]]) -> None:
    """One line of points per task, with one point and its standard error per model."""
    for index, (name, points) in enumerate(scores.items()):
        style = look(index)
        shift = (index - (len(scores) - 1) / 2) * 0.7 / max(1, len(scores))
        known = [(p[0], -row - shift, p[1]) for row, p in enumerate(points) if p is not None]
        for value, y, stderr in known:
            if stderr is not None:
                axis.plot([value - stderr, value + stderr], [y, y], color=style["color"], linewidth=1)
        axis.plot([x for x, _, _ in known], [y for _, y, _ in known], style["marker"], color=style["color"],
                  markersize=5, label=shown(name))  # fmt: skip
    axis.set_yticks([-row for row in range(len(tasks))], [shown(task) for task in tasks])
    axis.set_ylim(-len(tasks) + 0.5, 0.5)
    axis.grid(True, axis="x")
    axis.set_xlabel("accuracy (± one standard error)")


def paint_latency(axis: Axes, content: LatencyResult) -> None:
    """Milliseconds per token over the budget, one line per policy, with p99 dotted above it."""
    rows = content.rows
    _draw_times(axis, rows, "budget", "policy")
    axis.set_xlabel("keys that a query sees")
    scale_values(axis, [row.ms_per_token for row in rows if row.ms_per_token is not None])
    ticks_at(axis, sorted({row.budget for row in rows}))


def paint_stream(axis: Axes, content: LatencyResult) -> None:
    """Milliseconds per token along one stream; the y axis begins at zero."""
    _draw_times(axis, content.stream, "seen", "label")
    tokens_axis(axis)
    axis.set_xlabel("tokens seen")
    axis.set_ylim(bottom=0)


def draw_latency(path: Path, content: LatencyResult) -> None:
    """The figure of `sink-eval latency --plot`: a step over budgets and, if measured, along a stream."""
    panels = 1 + bool(content.stream)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0] * panels, SIZE[1] + 0.4), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        paint_latency(axes[0], content)
        axes[0].set_title(f"A decoding step, {shown(Path(content.model).name)}")
        if content.stream:
            paint_stream(axes[1], content)
            axes[1].set_title("Along a stream")
        for axis in axes:
            axis.legend()
        figure.savefig(path, dpi=130, format="png", facecolor="white")


def _draw_times(axis: Axes, rows: Sequence[LatencyRow | StreamRow], x: str, line: str) -> None:
    names = list(dict.fromkeys(getattr(row, line) for row in rows))
    for form in ("ms_per_token", "ms_per_token_p99"):
        lines = {
            name: [(getattr(row, x), getattr(row, form)) for row in rows if getattr(row, line) == name]
            for name in names
        }
        if form == "ms_per_token":
            draw_lines(axis, lines)
            continue
        for index, points in enumerate(lines.values()):
            known = [(x, y) for x, y in points if y is not None]
            if known:
                axis.plot(*zip(*known), ":", color=look(index)["color"], linewidth=0.8)
    axis.set_ylabel("ms per token (thin dots: p99)")


def _values(lines: Lines) -> list[float]:
    return [y for points in lines.values() for _, y in points if y is not None]


def paint_memories(axis: Axes, content: MemoriesResult) -> None:
    """Nats per token over bytes held, one line per memory; dense's loss is a horizontal line."""
    known = [
        (row.memory, row.bytes_held / 2**20, row.nll) for row in content.rows if row.bytes_held and row.nll is not None
    ]
    lines: Lines = {
        name: sorted((size, nll) for memory, size, nll in known if memory == name)
        for name in dict.fromkeys(memory for memory, *_ in known)
    }
    draw_lines(axis, lines)
    if known:
        axis.axhline(known[0][2], color=GRID, linewidth=0.8)  # dense
        sizes = [size for _, size, _ in known]
        first, last = math.floor(math.log2(min(sizes))), math.ceil(math.log2(max(sizes)))
        ticks_at(axis, [2.0**power for power in range(first, last + 1)])
    axis.set_xlabel(f"MiB held after {content.prompt} tokens of prompt")
    axis.set_ylabel(f"nats per token over the next {content.after}")


def paint_kept(axis: Axes, names: Sequence[str], shares: Sequence[float | None], mean: float | None) -> None:
    """The % kept of each kind of token as bars, the first on top; a dotted line is the % of all tokens."""
    places = [-row for row in range(len(names))]
    axis.barh(places, [math.nan if x is None else 100 * x for x in shares], height=0.66, color=COLOURS[0])
    for place, share in zip(places, shares):
        if share is not None:
            axis.annotate(f"{100 * share:.0f}", (100 * share, place), xytext=(3, 0), textcoords="offset points",
                          va="center", fontsize=8.5)  # fmt: skip
    if mean is not None:
        axis.axvline(100 * mean, color=INK, linestyle=":", linewidth=1)
    axis.set_yticks(places, [shown(name) for name in names])
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(0, 108)  # leaves room for the number of a full bar
    axis.set_xticks(range(0, 101, 25))
    axis.set_xlabel("% kept (dotted: of all tokens)")


def draw_memories(path: Path, content: MemoriesResult) -> None:
    """The figure of `sink-eval memories --plot`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0], SIZE[1] + 0.4), layout="constrained")
        axis = figure.subplots()
        paint_memories(axis, content)
        axis.set_title(f"Memories, {shown(Path(content.model).name)}")
        axis.legend()
        figure.savefig(path, dpi=130, format="png", facecolor="white")
