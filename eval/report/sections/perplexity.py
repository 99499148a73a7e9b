"""Perplexity under streaming caches: the grid, by position in the stream, and by budget."""

from __future__ import annotations

import functools
from typing import Any

from eval.report.blocks import Chart, Note, Section, Table, between, figure, short_names, stream_name
from eval.report.charts import panel, shown, ticks_at
from eval.report.inputs import Inputs
from eval.report.plots import paint_budgets, paint_positions
from sinkmodel.perplexity import perplexity
from sinkmodel.results.perplexity import GridResult, GridRow, PerplexityResult, PerplexityRow

Points = list[tuple[float, "float | None", "float | None", "float | None"]]  # x, perplexity, its interval


def grid(inputs: Inputs) -> Section | None:
    """`sink-eval grid`: models × S+W × budgets, with the paper's numbers below if it has them."""
    found = inputs.of(GridResult)
    made = Section("grid", "The grid")
    for number, content in enumerate(found, 1):
        made.blocks += [Note(warning, "warning", "Warning") for warning in content.warnings]
        made.blocks.append(_grid_table(content))
        made.blocks.append(_grid_chart(content, number))
    return made if found else None


def _grid_table(content: GridResult) -> Table:
    rows, has_paper = [], False
    for name in dict.fromkeys(row.model for row in content.rows):
        for budget in content.budgets:
            cells = {row.sinks: row for row in content.rows if (row.model, row.budget) == (name, budget)}
            if not cells:
                continue
            one = next(iter(cells.values()))
            numbers = [_cell(cells[count]) if count in cells else "–" for count in content.sinks]
            rows.append([name, one.sink, str(len(one.runs)), str(budget), *numbers])
            if any(row.paper_ppl is not None for row in cells.values()):
                has_paper = True
                numbers = [figure(cells[count].paper_ppl) if count in cells else "–" for count in content.sinks]
                rows.append([f"{name}: the paper's", one.sink, "1", str(budget), *numbers])
    caption = (
        f"Perplexity over tokens that have overflowed the largest budget; {100 * content.level:g} % interval over "
        "runs with different seeds, on these texts. S+: the first S keys and the latest C − S."
    )
    if has_paper:
        caption += (
            " The paper's: StreamingLLM (arXiv 2309.17453), Tables 2, 3 and 6, a model of this shape on another text "
            "(PG-19): compare the pattern, not the numbers."
        )
    return Table(
        ["model", "sink", "runs", "C", *(f"{count}+" for count in content.sinks)], rows, words=2, caption=caption
    )


def _cell(row: GridRow) -> str:
    cell = figure(row.ppl_after_overflow)
    return cell if row.ppl_low is None else f"{cell} {between(row.ppl_low, row.ppl_high, ',.2f')}"


def _grid_chart(content: GridResult, number: int) -> Chart:
    """With several budgets: one panel per model, over the budget. With one budget: one line per model, over S."""
    rows = content.rows
    models = list(dict.fromkeys(row.model for row in rows))
    against_budget = len(content.budgets) > 1
    if against_budget:
        figures = {
            name: {f"{count}+": _points(rows, "budget", model=name, sinks=count) for count in content.sinks}
            for name in models
        }
    else:
        figures = {"": {name: _points(rows, "sinks", model=name) for name in models}}
    panels = []
    for title, lines in figures.items():
        label = "budget C (keys)" if against_budget else f"S sinks, C = {content.budgets[0]}"
        alt = f"{title + ': ' if title else ''}perplexity after overflow over {label}; {extremes(lines)}"
        panels.append(panel(alt, functools.partial(_paint, lines=lines, label=label, title=title)))
    keys = ["model", "sink", "sinks", "budget", "ppl_after_overflow", "ppl_low", "ppl_high", "paper_ppl"]
    caption = "Perplexity after overflow against " + ("the budget." if against_budget else "the number of sinks.")
    return Chart(f"grid-{number}", panels, keys, [[getattr(row, key) for key in keys] for row in rows], caption)


def _points(rows: list[GridRow], x: str, **wanted: Any) -> Points:
    return [
        (getattr(row, x), row.ppl_after_overflow, row.ppl_low, row.ppl_high)
        for row in rows
        if all(getattr(row, key) == value for key, value in wanted.items())
    ]


def _paint(axis: Any, lines: dict[str, Points], label: str, title: str) -> None:
    paint_budgets(axis, lines)
    places = sorted({x for points in lines.values() for x, *_ in points})
    ticks_at(axis, places)
    axis.set(xlabel=label, title=shown(title))


def extremes(lines: dict[str, Points]) -> str:
    """A phrase with the lowest and highest value of all lines."""
    values = [(value, name) for name, points in lines.items() for _, value, *_ in points if value is not None]
    if not values:
        return "nothing was measured"
    (low, of_low), (high, of_high) = min(values), max(values)
    return f"lowest {figure(low)} ({of_low}), highest {figure(high)} ({of_high})"


# -------------------------------------------------------------------------------------------------------- of one model


def positions(inputs: Inputs) -> Section | None:
    """`sink-eval ppl`: perplexity by position in the stream."""
    found = inputs.of(PerplexityResult)
    if not found:
        return None
    names = short_names(content.model for content in found)
    made = Section("positions", "Perplexity by position")
    panels = []
    for content in found:
        title = f"{names[content.model]}, budget {content.budget}"
        lines: dict[str, Points] = {stream_name(row): _total(row) for row in content.rows}
        alt = f"{title}: perplexity by position in the stream; overall {extremes(lines)}"
        panels.append(panel(alt, functools.partial(_paint_positions, content=content, title=title)))
    header = ["model", "budget", "policy", "sinks", "window", "first", "last", "nll"]
    numbers = [
        [content.model, content.budget, row.policy, row.sinks, row.window, *bin_]
        for content in found
        for row in content.rows
        for bin_ in row.by_position
    ]
    caption = "Shaded: after the first eviction. Means over the texts, in bins."
    made.blocks.append(Chart("perplexity-by-position", panels, header, numbers, caption))
    made.blocks.append(
        Table(
            ["model", "policy", "C", "tokens", "nats", "perplexity", "nats ≥C", "±", "perplexity ≥C"],
            [
                [
                    names[content.model],
                    stream_name(row),
                    str(content.budget),
                    figure(row.tokens, ",.0f"),
                    figure(row.nll, ".4f"),
                    figure(perplexity(row.nll)),
                    figure(row.nll_after_overflow, ".4f"),
                    figure(row.stderr_after_overflow, ".4f"),
                    figure(perplexity(row.nll_after_overflow)),
                ]
                for content in found
                for row in content.rows
            ],
            words=2,
            caption="≥C: queries at positions ≥ C, after the first eviction; ±: standard error over blocks of C "
            "tokens.",
        )
    )
    return made


def _total(row: PerplexityRow) -> Points:
    return [(0, perplexity(row.nll), None, None)]


def _paint_positions(axis: Any, content: PerplexityResult, title: str) -> None:
    paint_positions(axis, content)
    axis.set_title(shown(title))


def budgets(inputs: Inputs) -> Section | None:
    """Results of `sink-eval ppl` of one model at several budgets."""
    by_model: dict[str, list[PerplexityResult]] = {}
    for content in inputs.of(PerplexityResult):
        by_model.setdefault(content.model, []).append(content)
    several = {name: of for name, of in by_model.items() if len({content.budget for content in of}) > 1}
    if not several:
        return None
    panels, numbers = [], []
    names = short_names(several)
    for name, of_model in several.items():
        lines: dict[str, Points] = {}
        for content in sorted(of_model, key=lambda content: content.budget):
            for row in content.rows:
                nll, stderr = row.nll_after_overflow, row.stderr_after_overflow
                low, high = (None if nll is None or stderr is None else nll + side * 1.96 * stderr for side in (-1, 1))
                policy = f"{row.sinks}+" if row.policy in ("sink", "window") else row.policy
                point = (content.budget, perplexity(nll), perplexity(low), perplexity(high))
                lines.setdefault(policy, []).append(point)
                numbers.append([name, policy, *point])
        alt = f"{names[name]}: perplexity after overflow over the budget; {extremes(lines)}"
        panels.append(panel(alt, functools.partial(_paint, lines=lines, label="budget C (keys)", title=names[name])))
    header = ["model", "policy", "budget", "ppl_after_overflow", "low", "high"]
    caption = "Bars: ± 1.96 standard errors. The number of a budget is over its own queries after overflow."
    chart = Chart("perplexity-by-budget", panels, header, numbers, caption)
    return Section("budgets", "Perplexity against budget", [chart])
