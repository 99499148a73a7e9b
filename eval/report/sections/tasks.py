"""The abilities of models and their cost: zero-shot tasks, StreamEval, latency."""

from __future__ import annotations

import functools
from typing import Any

from eval.report.blocks import Chart, Section, Table, between, figure, short_names
from eval.report.charts import panel, shown, ticks_at
from eval.report.inputs import Inputs
from eval.report.plots import draw_lines, paint_latency, paint_scores, paint_stream
from sinkmodel.results.latency import LatencyResult
from sinkmodel.results.streams import LinesResult, QuestionsResult, StreamEvalResult
from sinkmodel.results.tasks import ZeroshotResult


def zeroshot(inputs: Inputs) -> Section | None:
    """`sink-eval zeroshot`: lm-eval's tasks, with exactly one set of sinks ("adapter") and with stock lm-eval."""
    found = inputs.of(ZeroshotResult)
    if not found:
        return None
    names = short_names(content.model for content in found)
    made = Section("zeroshot", "Zero-shot tasks")
    keys = ["task", "metric", "filter", "questions", "stock", "stock_stderr", "adapter", "adapter_stderr", "paper"]
    numbers = [[content.model, *(getattr(row, key) for key in keys)] for content in found for row in content.rows]
    accuracies = [(c.model, row) for c in found for row in c.rows if row.metric == "acc" and row.filter == "none"]
    if accuracies:
        tasks = list(dict.fromkeys(row.task for _, row in accuracies))
        scores: dict[str, list[tuple[float, float | None] | None]] = {}
        for model, name in names.items():
            of_model = {
                row.task: (row.adapter, row.adapter_stderr)
                for of, row in accuracies
                if of == model and row.adapter is not None
            }
            scores[name] = [of_model.get(task) for task in tasks]
        alt = f"Accuracy of {', '.join(names.values())} on {', '.join(tasks)}; the numbers are in the table"
        size = (5.0, 0.9 + 0.32 * len(tasks))
        paint = functools.partial(paint_scores, tasks=tasks, scores=scores)
        made.blocks.append(Chart("zeroshot", [panel(alt, paint, size)], ["model", *keys], numbers))
    made.blocks.append(
        Table(
            ["model", "task", "metric", "questions", "stock", "±", "adapter", "±", "paper"],
            [
                [
                    names[content.model],
                    row.task,
                    row.metric if row.filter == "none" else f"{row.metric}, {row.filter}",
                    f"{row.questions:,}",
                    *(
                        figure(getattr(row, key), ".4f")
                        for key in ("stock", "stock_stderr", "adapter", "adapter_stderr")
                    ),
                    figure(row.paper, ".3f"),
                ]
                for content in found
                for row in content.rows
            ],
            words=3,
            caption="adapter: with exactly one set of the model's sinks in front, as in the figure; stock: unchanged "
            "lm-eval; ±: standard error; paper: StreamingLLM, Table 4, 160M model with as many sinks.",
        )
    )
    return made


# --------------------------------------------------------------------------------------------------------- StreamEval


def streameval(inputs: Inputs) -> Section | None:
    """`sink-eval streameval`: lines by distance, and questions one after the other."""
    found = inputs.of(StreamEvalResult)
    if not found:
        return None
    names = short_names(content.model for content in found)
    made = Section("streameval", "What a stream remembers")
    for number, content in enumerate(found, 1):
        name = names[content.model]
        if isinstance(content, LinesResult):
            made.blocks += _chart(content, name, number)
            made.blocks.append(_lines_table(content, name))
        elif isinstance(content, QuestionsResult):
            made.blocks.append(_questions_table(content, name))
    return made


def _chart(content: LinesResult, name: str, number: int) -> list[Chart]:
    """Accuracy and nats over distance; empty if there is only one distance."""
    rows = content.rows
    places = sorted({row.distance for row in rows if row.distance is not None})
    if len(places) < 2:
        return []
    panels = []
    for key, label in (("accuracy", "accuracy"), ("nll", "nats of the answer")):
        lines = {
            policy: [(row.distance, getattr(row, key)) for row in rows if row.label == policy and row.distance]
            for policy in dict.fromkeys(row.label for row in rows)
        }
        paint = functools.partial(_paint_distances, lines=lines, label=label, title=name, places=places)
        alt = f"{name}: {label} by how many lines back the answer is; the numbers are in the table"
        panels.append(panel(alt, paint))
    keys = ["policy", "label", "budget", "distance", "accuracy", "accuracy_stderr", "nll", "nll_stderr", "kept"]
    return [Chart(f"streameval-{number}", panels, keys, [[getattr(row, key) for key in keys] for row in rows])]


def _paint_distances(axis: Any, lines: dict[str, Any], label: str, title: str, places: list[float]) -> None:
    draw_lines(axis, lines)
    ticks_at(axis, places)
    axis.set(xlabel="lines back", ylabel=label, title=shown(title))
    if label == "accuracy":
        axis.set_ylim(-0.03, 1.03)


def _lines_table(content: LinesResult, name: str) -> Table:
    others, among = content.distractors, "other numbers of the stream"
    if others is not None:
        among = f"{others} {among}, by chance {others / 2 + 1:g}"
    return Table(
        ["policy", "lines back", "tokens back", "kept", "accuracy", "±", "nats", "±", "rank", "±"],
        [
            [
                row.label,
                *(figure(getattr(row, key), ",.0f") for key in ("distance", "tokens_back_most")),
                figure(row.kept, ".0%"),
                *(figure(getattr(row, key), ".4f") for key in ("accuracy", "accuracy_stderr")),
                *(figure(getattr(row, key), ".3f") for key in ("nll", "nll_stderr", "rank", "rank_stderr")),
            ]
            for row in content.rows
        ],
        caption=f"{name}, StreamEval: kept: share of queries whose line is whole in the cache; accuracy: greedy "
        f"decoding gives the answer; nats: of the answer; rank: of the answer among itself and {among}; ±: standard "
        "error over samples.",
    )


def _questions_table(content: QuestionsResult, name: str) -> Table:
    return Table(
        ["policy", "accuracy", "±", "− one-shot", "±", "nats", "±"],
        [
            [
                row.label,
                *(figure(getattr(row, key), ".4f") for key in ("accuracy", "accuracy_stderr")),
                figure(row.difference, "+.4f"),
                figure(row.difference_stderr, ".4f"),
                *(figure(getattr(row, key), ".3f") for key in ("nll", "nll_stderr")),
            ]
            for row in content.rows
        ],
        caption=f"{name}: questions one after the other in one stream, compared to each in an empty cache (one-shot).",
    )


# ------------------------------------------------------------------------------------------------------------ latency


def latency(inputs: Inputs) -> Section | None:
    """`sink-eval latency`: the cost of a decoding step once the cache is full."""
    found = inputs.of(LatencyResult)
    if not found:
        return None
    names = short_names(content.model for content in found)
    made = Section("latency", "Latency")
    for number, content in enumerate(found, 1):
        _add_latency(made, content, names[content.model], number)
    return made


def _add_latency(made: Section, content: LatencyResult, name: str, number: int) -> None:
    rows, stream = content.rows, content.stream
    alt = f"{name}: milliseconds per token over the keys that a query sees; the numbers are in the table"
    panels = [panel(alt, functools.partial(_titled, paint_latency, f"A decoding step, {name}", content=content))]
    if stream:
        alt = f"{name}: milliseconds per token along a stream; the numbers are in the table"
        panels.append(panel(alt, functools.partial(_titled, paint_stream, "Along a stream", content=content)))
    keys = ["label", "budget", "seen", "ms_per_token", "ms_per_token_p99", "peak_bytes", "resident_bytes"]
    numbers = [[getattr(row, key, None) for key in keys] for row in (*rows, *stream)]
    made.blocks.append(Chart(f"latency-{number}", panels, keys, numbers))
    made.blocks.append(
        Table(
            ["policy", "C", "ms/token", "p99", "peak MiB"],
            [
                [
                    row.label,
                    f"{row.budget:,}",
                    *(figure(getattr(row, key)) for key in ("ms_per_token", "ms_per_token_p99")),
                    _mebibytes(row.peak_bytes, ",.0f"),
                ]
                for row in rows
            ],
            caption=f"{name}, {content.dtype}, {content.device}, threads: {content.threads}; ms: median.",
        )
    )
    if content.ratios:
        made.blocks.append(
            Table(
                ["ratio of ms/token", "C", "rounds", "×", "95 % interval"],
                [
                    [
                        row.ratio,
                        f"{row.budget:,}",
                        str(row.rounds),
                        figure(row.value),
                        between(row.low, row.high, ".2f"),
                    ]
                    for row in content.ratios
                ],
                caption="Median over rounds in which the two sides took turns.",
            )
        )
    if stream:
        made.blocks.append(
            Table(
                ["along a stream", "tokens seen", "ms/token", "p99", "× new", "95 % interval", "process MiB"],
                [
                    [
                        row.label,
                        f"{row.seen:,}",
                        *(figure(getattr(row, key)) for key in ("ms_per_token", "ms_per_token_p99", "value")),
                        between(row.low, row.high, ".2f"),
                        _mebibytes(row.resident_bytes, ",.1f"),
                    ]
                    for row in stream
                ],
                caption="× new: relative to a stream that has just filled its cache, measured in turns.",
            )
        )


def _titled(paint: Any, title: str, axis: Any, content: LatencyResult) -> None:
    paint(axis, content)
    axis.set_title(title)


def _mebibytes(value: float | None, form: str) -> str:
    return "–" if value is None else figure(value / 2**20, form)
