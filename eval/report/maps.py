"""Averaged attention maps as a picture and as CSV (StreamingLLM, Figures 2 and 7).

The colour map is cividis, which also works for colour-blind readers and in greyscale.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

if TYPE_CHECKING:
    from torch import Tensor

COLOURS = "cividis"
COLUMNS = 7  # panels in a row, at most


def papers_heads(layers: int) -> list[tuple[int, int]]:
    """(layer, head) as in Figure 2: head 0 of layers 0, 1, 2, 9, 16, 23 and 31 of 32; other depths spread evenly."""
    chosen = [0, 1, 2, *(2 + (layers - 3) * i // 4 for i in range(1, 5))]
    return [(layer, 0) for layer in sorted({layer for layer in chosen if 0 <= layer < layers})]


def write_maps(folder: Path, means: list[dict[str, Tensor]], heads: list[tuple[int, int]], sinks: int) -> None:
    """Write `maps.csv` with all heads and `maps.png` with those of `heads`; `means` is what `Tally.means` returns."""
    with (folder / "maps.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["layer", "head", "query", "key", "logit", "weight"])
        for layer, mean in enumerate(means):
            for head in range(len(mean["weight"])):
                writer.writerows([layer, head, *cell] for cell in cells(mean, head))
    draw_maps(folder / "maps.png", means, heads, sinks)


def cells(mean: dict[str, Tensor], head: int) -> list[tuple[int, int | str, float, float]]:
    """(query, key, mean logit, mean weight) of a head; a sink in the softmax, if any, is each query's first key."""
    score_PP, weight_PP = mean["score"][head].tolist(), mean["weight"][head].tolist()
    found: list[tuple[int, int | str, float, float]] = []
    for query in range(len(weight_PP)):
        if "sink_weight" in mean:
            logit, weight = (mean[name][head, query].item() for name in ("sink_score", "sink_weight"))
            found.append((query, "sink", logit, weight))
        found += [(query, key, score_PP[query][key], weight_PP[query][key]) for key in range(query + 1)]
    return found


def draw_maps(path: Path, means: list[dict[str, Tensor]], heads: list[tuple[int, int]], sinks: int) -> None:
    """Draw weights above, on one scale from 0 to 1, and logits below, each on its own scale."""
    bands = math.ceil(len(heads) / COLUMNS)
    columns = math.ceil(len(heads) / bands)
    figure, axes = plt.subplots(
        2 * bands, columns, figsize=(2.7 * columns + 0.6, 5.2 * bands), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for i, (layer, head) in enumerate(heads):
        band, column = divmod(i, columns)
        mean = means[layer]
        for row, name, limits in ((0, "weight", (0, 1)), (1, "score", (None, None))):
            axis = axes[2 * band + row, column]
            axis.set_visible(True)
            paint_map(axis, _with_sink(mean, name, head), limits, sinks, "sink_weight" in mean)
            axis.set(title="" if row else f"layer {layer}, head {head}")
            axis.set(ylabel="" if column else f"{'logit' if row else 'weight'}, by query")
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def _with_sink(mean: dict[str, Tensor], name: str, head: int) -> list[list[float]]:
    """A head's map. Masked keys are NaN, which is not drawn; a sink in the softmax is the first column."""
    rows = mean[name][head].tolist()
    P = len(rows)
    shown = [[rows[i][j] if j <= i else math.nan for j in range(P)] for i in range(P)]
    if f"sink_{name}" in mean:
        shown = [[sink, *row] for sink, row in zip(mean[f"sink_{name}"][head].tolist(), shown)]
    return shown


def paint_map(axis: Axes, rows: list[list[float]], limits: tuple, sinks: int, in_softmax: bool) -> None:
    """Draw one map. The first `sinks` keys, or the first column if it is a sink in the softmax, are labelled S."""
    image = axis.imshow(rows, cmap=COLOURS, vmin=limits[0], vmax=limits[1])
    axis.figure.colorbar(image, ax=axis, shrink=0.75, aspect=14).ax.tick_params(labelsize=7)
    places = range(0, len(rows), 5)
    front = int(in_softmax)
    names = ["S" if place < sinks else str(place) for place in places]
    axis.set_xticks([*([0] if in_softmax else []), *(place + front for place in places)])
    axis.set_xticklabels([*(["S"] if in_softmax else []), *names])
    axis.set_yticks(list(places))
    axis.set_yticklabels(names)
    axis.tick_params(labelsize=7)
    axis.set_xlabel("key (S: sink)" if in_softmax or sinks else "key", fontsize=8)
    axis.set_ylabel("query", fontsize=8)
    axis.spines[:].set_visible(False)
