"""Make the README's picture from the results of `make demo`: perplexity along the stream.

    python docs/picture.py runs/demo/ppl docs/streams.svg

One SVG for light and dark pages. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.report.charts import GRID, STYLE, draw_lines, inline, plain, scale_values
from sinkmodel.perplexity import perplexity
from sinkmodel.results.files import read_kind
from sinkmodel.results.perplexity import PerplexityResult

MERGED = 2  # bins of the result per point, since single ones are noisy
# The report's colours (eval/report/templates/page.css). `inline` leaves colours to the page, which here is the picture.
COLOURS = """<style>
svg { color: #1b1e23; --line-0: #0072b2; --line-1: #d55e00; --line-2: #009e73; --line-3: #cc79a7; --line-4: #e69f00; }
@media (prefers-color-scheme: dark) { svg { color: #e4e6ea; --line-0: #56b4e9; --line-1: #e8762b; } }
</style>"""
ALT = """Perplexity along the stream. SmolLM2-135M, 256 keys a query: with the window alone it rises to about 40 at the
first eviction and stays there; with one trained sink it stays at about 15, near the dense model. The small twins, 128
keys: dense rises beyond 256 trained positions, all caches stay level, with a sink or without."""


def main(folder: Path, output: Path) -> None:
    files = {name: folder / f"{name}.json" for name in ("smollm2", "smollm2-sink", "vanilla", "sink")}
    results = {name: read_kind(file, PerplexityResult) for name, file in files.items()}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.7), layout="constrained")
        left, right = figure.subplots(1, 2)
        smollm2 = {
            "0+256": line_of(results["smollm2"], "window", 0),
            "trained sink 1+255": line_of(results["smollm2-sink"], "sink", 1),
            "dense": line_of(results["smollm2"], "dense", 0),
        }
        paint(left, "SmolLM2-135M, and one trained sink", 256, smollm2)
        twins = {
            "vanilla 0+128": line_of(results["vanilla"], "window", 0),
            "sink model 1+127": line_of(results["sink"], "sink", 1),
            "vanilla, dense": line_of(results["vanilla"], "dense", 0),
        }
        paint(right, "The demo's twins: 1.9M parameters, no sink yet", 128, twins)
        left.set_ylabel("perplexity")
        vectors = io.StringIO()
        figure.savefig(vectors, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator")))
    svg = inline(vectors.getvalue(), " ".join(ALT.split()))
    head, _, rest = svg.partition(">")
    output.write_text(f"{head}>{COLOURS}{rest}\n", encoding="utf-8")


def line_of(result: PerplexityResult, policy: str, sinks: int) -> list[tuple[float, float | None]]:
    """(place, perplexity) points of one row, with MERGED bins per point."""
    (row,) = [row for row in result.rows if (row.policy, row.sinks) == (policy, sinks)]
    bins = row.by_position
    groups = [bins[start : start + MERGED] for start in range(0, len(bins), MERGED)]
    points: list[tuple[float, float | None]] = []
    for group in groups:
        losses = [nll for *_, nll in group if nll is not None]
        place = (group[0][0] + group[-1][1]) / 2
        points.append((place, perplexity(sum(losses) / len(losses)) if losses else None))
    return points


def paint(axis: Axes, title: str, budget: int, lines: dict[str, list[tuple[float, float | None]]]) -> None:
    draw_lines(axis, lines, markers=6)
    scale_values(axis, [y for points in lines.values() for _, y in points if y is not None])
    axis.axvline(budget, color=GRID, linestyle=":", linewidth=1.2)
    axis.annotate(
        "keys are evicted →", (budget, 1), xycoords=("data", "axes fraction"), xytext=(4, -2),
        textcoords="offset points", va="top", fontsize=8.5,
    )  # fmt: skip
    axis.set(title=title, xlabel="place in the stream (tokens)")
    axis.margins(y=0.16)
    axis.xaxis.set_major_formatter(plain)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
