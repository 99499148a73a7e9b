"""Where attention goes: by layer and head, over checkpoints, and in averaged maps."""

from __future__ import annotations

import functools
from typing import Any

from eval.report.blocks import Chart, Note, Section, Table, figure, short_names
from eval.report.charts import panel, shown
from eval.report.inputs import Inputs, Maps
from eval.report.maps import paint_map, papers_heads
from eval.report.plots import paint_births, paint_heads, paint_layers
from sinkmodel.results.attention import SHARES, Birth, BirthResult, CheckpointRow, LayerRow, SinksResult

SMALL = (2.5, 2.4)  # inches
HEADS = ["α sink", "heads", "α first", "heads", "→ sink", "→ first", "→ rest"]


def layers(inputs: Inputs) -> Section | None:
    """`sink-eval sinks` of one model: the share of attention by layer, the sink metric by head."""
    found = inputs.of(SinksResult)
    if not found:
        return None
    made = Section("attention", "Where attention goes")
    names = short_names(content.model for content in found)
    for number, content in enumerate(found, 1):
        name, rows = names[content.model], content.rows
        target = "first" if rows[0].sink_alpha is None else "sink"
        of_target = "the first text token" if target == "first" else "the sink"
        ends = ", ".join(
            f"{kind} {figure(_mean(rows, f'{kind}_share'), '.3f')}"
            for kind in ("sink", "first", "rest")
            if _mean(rows, f"{kind}_share") is not None
        )
        alt = f"{name}: share of attention by layer; mean on {ends}"
        panels = [panel(alt, functools.partial(_titled, paint_layers, name, rows=rows))]
        if all(row.heads for row in rows):
            mean = figure(_mean(rows, f"{target}_alpha"), ".3f")
            alt = f"{name}: α of {of_target} for each layer and head; mean {mean}"
            title = f"{name}: α of {of_target}"
            paint = functools.partial(
                paint_heads, layers=[[head.shares[f"{target}_alpha"] for head in row.heads] for row in rows]
            )
            panels.append(panel(alt, functools.partial(_titled, paint, title)))
        header = ["layer", "head", *SHARES]
        numbers = [[row.layer, head.head, *head.shares.values()] for row in rows for head in row.heads]
        made.blocks.append(Chart(f"attention-{number}", panels, header, numbers))
        made.blocks.append(
            Table(
                ["layer", *HEADS, "largest |h|", "× median"],
                [[str(row.layer), *_cells(row)] for row in rows],
                caption=f"{name}: α: mean over queries i ≥ k of A(i, k); heads: share of heads with α above "
                f"{figure(content.epsilon, 'g')} (Gu et al., arXiv 2410.10781); →: share of attention; |h|: "
                f"activations that the layer reads. {content.sequences} sequences of {content.length} tokens.",
            )
        )
    return made


def births(inputs: Inputs) -> Section | None:
    """`sink-eval sinks --checkpoints`: heads with a sink over the checkpoints of runs."""
    found = inputs.of(BirthResult)
    if not found:
        return None
    names = short_names(content.model for content in found)
    made = Section("births", "When the sink is born")
    lines: dict[str, list[tuple[float, float | None]]] = {}
    born: list[tuple[float, float] | None] = []
    for content in found:
        target = content.born.target
        of_target = "the first text token" if target == "first" else "the sink"
        name = f"{names[content.model]}: at {of_target}"
        points: list[tuple[float, float | None]] = [(row.tokens, row.shares[f"{target}_heads"]) for row in content.rows]
        lines[name] = points
        at = content.born.tokens
        share = next((y for x, y in points if x == at and y is not None), None)
        born.append(None if at is None or share is None else (at, share))
        made.blocks.append(Note(_birth(content.born, of_target), "plain", names[content.model]))
    thresholds = {content.born.threshold for content in found if content.born.threshold is not None}
    alt = "Share of heads with a sink over training tokens. " + " ".join(
        f"{names[content.model]}: {note.text}" for content, note in zip(found, made.blocks) if isinstance(note, Note)
    )
    paint = functools.partial(paint_births, lines=lines, births=born, thresholds=thresholds)
    keys = ["step", "tokens", *SHARES]
    numbers = [[content.model, *(getattr(row, key) for key in keys)] for content in found for row in content.rows]
    made.blocks.append(
        Chart("births", [panel(alt, paint)], ["model", *keys], numbers, "Dotted: the threshold of a birth.")
    )
    made.blocks.append(
        Table(
            ["run", "step", "tokens", *HEADS, "largest |h|", "× median"],
            [
                [names[content.model], f"{row.step:,}", f"{row.tokens:,}", *_cells(row)]
                for content in found
                for row in content.rows
            ],
        )
    )
    return made


def maps(inputs: Inputs) -> Section | None:
    """Averaged attention maps of `sink-eval sinks --maps` (StreamingLLM, Figures 2 and 7)."""
    if not inputs.maps:
        return None
    made = Section("maps", "Attention maps")
    names = short_names(str(of.path) for of in inputs.maps)
    for number, of in enumerate(inputs.maps, 1):
        name = names[str(of.path)]
        chosen = [head for head in papers_heads(1 + max(layer for layer, _ in of.heads)) if head in of.heads]
        panels = []
        for layer, head in chosen or list(of.heads)[:7]:
            for kind in ("weight", "logit"):
                rows, in_softmax = _square(of, layer, head, kind)
                title = f"layer {layer}, head {head}: {kind}"
                alt = f"{name}, {title}s averaged over texts, one row per query, one column per key"
                limits = (0, 1) if kind == "weight" else (None, None)
                paint = functools.partial(_paint_map, rows=rows, limits=limits, in_softmax=in_softmax, title=title)
                panels.append(panel(alt, paint, SMALL))
        header = ["layer", "head", "query", "key", "logit", "weight"]
        numbers = [[*place, *cell] for place, cells in of.heads.items() for cell in cells]
        caption = f"{name}: means over texts; a row is a query, a column a key, S a sink in the softmax."
        made.blocks.append(Chart(f"maps-{number}", panels, header, numbers, caption, small=True))
    return made


def _paint_map(axis: Any, rows: list[list[float]], limits: tuple, in_softmax: bool, title: str) -> None:
    paint_map(axis, rows, limits, sinks=0, in_softmax=in_softmax)
    axis.set_title(title, fontsize=9)


def _square(of: Maps, layer: int, head: int, kind: str) -> tuple[list[list[float]], bool]:
    """A head's map, one row per query, NaN for keys that it cannot see; a sink in the softmax is the first column."""
    cells = of.heads[layer, head]
    size = 1 + max(query for query, *_ in cells)
    front = int(any(key == "sink" for _, key, *_ in cells))
    rows = [[float("nan")] * (size + front) for _ in range(size)]
    for query, key, logit, weight in cells:
        value = weight if kind == "weight" else logit
        if value is not None:
            rows[query][0 if key == "sink" else int(key) + front] = value
    return rows, bool(front)


def _titled(paint: Any, title: str, axis: Any, **given: Any) -> None:
    paint(axis, **given)
    axis.set_title(shown(title) if len(title) < 30 else title)


def _cells(row: LayerRow | CheckpointRow) -> list[str]:
    measured = [figure(x, ".1%" if name.endswith("heads") else ".3f") for name, x in row.shares.items()]
    massive = " (massive)" if row.massive else ""
    return [*measured, figure(row.largest, ",.1f"), figure(row.times_median, ",.0f") + massive]


def _mean(rows: list[LayerRow], name: str) -> float | None:
    values = [row.shares[name] for row in rows]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _birth(birth: Birth, target: str) -> str:
    threshold = figure(birth.threshold, ".0%")
    if birth.step is None:
        return (
            f"no sink is born: its last checkpoint does not have more than {threshold} of heads with a sink at "
            f"{target}."
        )
    when = f"step {birth.step:,.0f}, {figure(birth.tokens, ',.0f')} tokens"
    return f"from {when} on, more than {threshold} of heads have a sink at {target}."
