"""The look of figures: an SVG that takes its colours from the page, and a PNG for use without a page.

Colours are Okabe and Ito's, which colour-blind people can distinguish. Every line also has its own dashes and markers.
Text in an SVG stays text, and the same numbers give the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from eval.report.blocks import LONGEST, Panel

INK = "#1b1e23"
GRID = "#8a8f98"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
DASHES = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2), (3, 1), (9, 3), (5, 1, 1, 1, 1, 1))
SIZE = (5.0, 3.1)  # inches: shrunk a little on a phone; on a laptop two fit side by side
THIRD = (3.5, 2.5)  # inches, if three are side by side
LEGEND_LINE = 0.2  # inches
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sinkmodel",
    "text.parse_math": False,  # names may contain dollar signs
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 9.5,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.linewidth": 0.7,
    "grid.linewidth": 0.6,
    "grid.color": GRID,
    "grid.alpha": 0.3,
}
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
# The names of the colours in the page's style sheet.
VARIABLES = {colour.lower(): f"var(--line-{i})" for i, colour in enumerate(COLOURS)} | {INK: "currentColor"}


def panels(painted: Sequence[tuple[str, Callable[[Axes], Any]]]) -> list[Panel]:
    """A figure for each (alternative text, `paint`); three figures are smaller, since they stand in one row."""
    return [panel(alt, paint, THIRD if len(painted) == 3 else SIZE) for alt, paint in painted]


def panel(alt: str, paint: Callable[[Axes], Any], size: tuple[float, float] = SIZE) -> Panel:
    """A figure with what `paint` draws on an empty Axes, and a legend below it if there are labels."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # this affects only the PNG; a browser has more fonts
        canvas = Figure(figsize=size, layout="constrained")
        axis = canvas.add_subplot()
        paint(axis)
        _add_legend(canvas, axis)
        pixels, vectors = io.BytesIO(), io.StringIO()
        canvas.savefig(pixels, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(vectors, format="svg", transparent=True, metadata=nothing)
    return Panel(alt, inline(vectors.getvalue(), alt), pixels.getvalue())


def _add_legend(canvas: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if not handles:
        return
    width, height = canvas.get_size_inches()
    most = max(1, int(13 * width) // (max(map(len, labels)) + 7))  # labels in one line
    lines = -(-len(labels) // most)
    columns = -(-len(labels) // lines)
    canvas.set_size_inches(width, height + LEGEND_LINE * lines)
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns)


def inline(document: str, alt: str) -> str:
    """matplotlib's SVG as an element of a page, which sets its size and colours; with an alternative text.

    Its ids may occur in other figures too; `eval.report.report` adds a prefix to make them unique.
    """
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(document)
    for name in ("width", "height"):
        root.attrib.pop(name)
    root.attrib |= {"role": "img", "aria-label": alt}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
        if style := parent.get("style"):
            parent.set("style", re.sub("#[0-9a-f]{6}", lambda found: VARIABLES.get(found[0], found[0]), style))
    return ElementTree.tostring(root, encoding="unicode")


def with_prefix(svg: str, prefix: str) -> str:
    """Add `prefix` to the ids of an SVG and to all references to them, so that figures on one page share no ids."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        for name, value in element.attrib.items():
            if name == "id":
                element.set(name, prefix + value)
            elif name in ("href", f"{{{XLINK}}}href") and value.startswith("#"):
                element.set(name, f"#{prefix}{value[1:]}")
            elif "url(#" in value and name != "aria-label":
                element.set(name, value.replace("url(#", f"url(#{prefix}"))
    return ElementTree.tostring(root, encoding="unicode")


# ---------------------------------------------------------------------------------------------------- lines and axes


def look(index: int, count: int = 1) -> dict[str, Any]:
    """A line's colour, dashes and marker. The first line is thickest, the last thinnest, so that overlaps show."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "dashes": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "linewidth": 1.2 + 1.6 * (count - 1 - index) / max(1, count - 1),
        "markersize": 5,
    }


def draw_lines(axis: Axes, lines: Mapping[str, Sequence[tuple[float, float | None]]], markers: int = 10) -> None:
    """Draw lines of (x, y) with about `markers` markers each; points without a y are left out."""
    for index, (name, points) in enumerate(lines.items()):
        known = [(x, y) for x, y in points if y is not None]
        if known:
            every = max(1, len(known) // markers)
            axis.plot(*zip(*known), label=shown(name), markevery=(index % every, every), **look(index, len(lines)))
    axis.grid(True)


def shown(name: str, longest: int = LONGEST) -> str:
    """A name for a legend, shortened; matplotlib would leave out a name that begins with an underscore."""
    name = name if len(name) <= longest else f"{name[: longest // 2]}…{name[-longest // 2 :]}"
    return f"\u200b{name}" if name.startswith("_") else name


def scale_values(axis: Axes, values: Sequence[float]) -> None:
    """Make the y axis logarithmic if the values are far apart, else linear, with ticks in plain numbers."""
    positive = [value for value in values if value > 0]
    if positive and max(positive) > 4 * min(positive):
        axis.set_yscale("log")
        wide = max(positive) > 100 * min(positive)
        axis.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5), numticks=8))
        axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(plain))


def ticks_at(axis: Axes, places: Sequence[float]) -> None:
    """Make the x axis logarithmic (base 2), with ticks at the measured values; at most 8 of them."""
    if len(places) > 1 and min(places) > 0:
        axis.set_xscale("log", base=2)
    every = -(-len(places) // 8)
    axis.set_xticks(sorted(places)[::every])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(plain))


def tokens_axis(axis: Axes) -> None:
    axis.set_xlabel("tokens")
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_short(value)))


def plain(value: float, _: Any = None) -> str:
    return f"{value:,.10g}" if abs(value) < 1e6 else f"{value:.0e}".replace("e+", "e")


def in_short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
