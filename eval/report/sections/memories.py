"""KV memories: their cost on the same prompts, the cost of reading a prompt, and tasks with long prompts."""

from __future__ import annotations

import functools
from typing import Any

from eval.report.blocks import Chart, Section, Table, between, figure, short_names
from eval.report.charts import panel, panels, shown
from eval.report.inputs import Inputs
from eval.report.plots import paint_heads, paint_kept, paint_memories
from sinkmodel.results.latency import PrefillResult, tokens_or_never
from sinkmodel.results.memories import AgeShare, Forgets, KindShare, MemoriesResult, keys_of
from sinkmodel.results.tasks import LongContextResult, LongContextRow

MEBIBYTE = 2**20
Share = tuple[str, KindShare | AgeShare]


def memories(inputs: Inputs) -> Section | None:
    """`sink-eval memories`: losses against dense, bytes and times."""
    found = inputs.of(MemoriesResult)
    if not found:
        return None
    names = short_names(content.model for content in found)
    made = Section("memories", "Memories")
    for number, content in enumerate(found, 1):
        name, rows = names[content.model], content.rows
        alt = f"{name}: nats per token over the bytes held, one line per memory; the numbers are in the table"
        paint = functools.partial(_titled, content=content, title=f"Memories, {name}")
        keys = ["memory", "budget", "tokens", "nll", "difference", "low", "high", "answer", "bytes_held", "bytes_kept"]
        numbers = [[getattr(row, key) for key in keys] for row in rows]
        made.blocks.append(Chart(f"memories-{number}", [panel(alt, paint)], keys, numbers))
        made.blocks.append(_table(content, name))
        if content.forgets is not None:
            made.blocks += _forgets(content.forgets, name, number)
    return made


def _forgets(forgets: Forgets, name: str, number: int) -> list[Chart | Table]:
    """Which tokens of its prompts a NAMM keeps, and how much each of its heads keeps, as a picture and in numbers."""
    of_tokens: list[Share] = [(row.kind, row) for row in forgets.kinds]
    of_tokens += [(f"age from {row.start:,}", row) for row in forgets.ages]
    kinds = Table(
        ["tokens", "number", "kept %"],
        [[kind, f"{row.tokens:,}", _percent(row.kept_share)] for kind, row in of_tokens],
        caption=f"{name}: share of the tokens of {forgets.prompts:,} prompts that namm keeps, as a mean over layers "
        "and KV heads; age: number of tokens after a token.",
    )
    heads = Table(
        ["layer", *(f"head {head}" for head in range(max(map(len, forgets.heads), default=0)))],
        [[str(layer), *map(_percent, shares)] for layer, shares in enumerate(forgets.heads)],
        caption="The % of a prompt that each KV head keeps with namm.",
    )
    return [_picture(forgets, name, number), kinds, heads] if any(forgets.heads) else [kinds]


def _picture(forgets: Forgets, name: str, number: int) -> Chart:
    """The shares that are kept by kind of token, by age, and by layer and KV head."""
    kinds: list[Share] = [(row.kind, row) for row in forgets.kinds]
    ages: list[Share] = [(f"from {row.start:,}", row) for row in forgets.ages]
    painted = []
    for rows, of, title in ((kinds, "kind", "By kind of token"), (ages, "age", "By age, in tokens after it")):
        words = ", ".join(f"{row_name} {_percent(row.kept_share)}" for row_name, row in rows)
        alt = f"{name}: the % of tokens that namm keeps, by {of}: {words}"
        painted.append((alt, functools.partial(_kept, rows=rows, title=title)))
    shares = [share for layer in forgets.heads for share in layer if share is not None]
    least, most = (_percent(end(shares, default=None)) for end in (min, max))
    alt = f"{name}: the share of a prompt that each KV head keeps, layer by layer, from {least} to {most} %"
    painted.append((alt, functools.partial(_heads, layers=forgets.heads)))
    numbers: list[list[Any]] = [["kind", row.kind, None, row.tokens, row.kept_share] for row in forgets.kinds]
    numbers += [["age", row.start, None, row.tokens, row.kept_share] for row in forgets.ages]
    for layer, of_layer in enumerate(forgets.heads):
        numbers += [["layer", layer, head, None, share] for head, share in enumerate(of_layer)]
    columns = ["by", "value", "head", "tokens", "kept_share"]
    return Chart(
        f"forgotten-{number}", panels(painted), columns, numbers, f"{name}: what namm keeps at the end of its prompts."
    )


def _kept(axis: Any, rows: list[Share], title: str) -> None:
    known = [(row.tokens, row.kept_share) for _, row in rows if row.kept_share is not None]
    tokens = sum(count for count, _ in known)
    mean = sum(count * share for count, share in known) / tokens if tokens else None
    paint_kept(axis, [name for name, _ in rows], [row.kept_share for _, row in rows], mean)
    axis.set_title(title)


def _heads(axis: Any, layers: list[list[float | None]]) -> None:
    paint_heads(axis, layers, "KV head")
    axis.set_title("Share kept by layer and KV head")


def _percent(share: float | None) -> str:
    return figure(share and 100 * share, ".1f")


def _titled(axis: Any, content: MemoriesResult, title: str) -> None:
    paint_memories(axis, content)
    axis.set_title(shown(title))


def _table(content: MemoriesResult, name: str) -> Table:
    return Table(
        [
            *("memory", "answer", "nats", "− dense", "interval"),
            *("keys", "MiB held", "MiB kept", "kept %", "prefill ×", "decode ×"),
        ],
        [
            [
                row.label,
                row.answer or "–",
                figure(row.nll, ".4f"),
                figure(row.difference, "+.4f"),
                between(row.low, row.high, "+.4f"),
                keys_of(row.keys_kept),
                *(
                    figure(getattr(row, key) and getattr(row, key) / MEBIBYTE, ",.1f")
                    for key in ("bytes_held", "bytes_kept")
                ),
                _percent(row.kept_share),
                *(figure(getattr(row, key)) for key in ("prefill_ratio", "decode_ratio")),
            ]
            for row in content.rows
        ],
        words=2,
        caption=f"{name}: {content.prompt:,} tokens of prompt, then {content.after:,} scored; − dense: paired "
        f"difference in nats per token, {100 * content.level:g} % interval, equivalent within "
        f"±{content.margin:g}; keys: tokens that a head holds at the end of the prompt, a mean over layers and heads; "
        "MiB held: at that time; kept: the keys and values of tokens in it; %: share of dense's; ×: ratio to dense's "
        f"time{_times(content)}.",
    )


def _times(content: MemoriesResult) -> str:
    """Dense's times, to which the ratios refer; empty if the file has none."""
    dense = next((row for row in content.rows if row.memory == "dense"), None)
    if dense is None or dense.prefill_seconds is None or dense.decode_ms is None:
        return ""
    return f", {figure(1000 * dense.prefill_seconds, ',.1f')} ms for a prompt, {figure(dense.decode_ms)} ms for a token"


def prefill(inputs: Inputs) -> Section | None:
    """`sink-eval latency --prefill`: time to the first token, memory, answers, and when one side overtakes another."""
    found = inputs.of(PrefillResult)
    if not found:
        return None
    names = short_names(content.model for content in found)
    made = Section("prefill", "Reading a prompt")
    for content in found:
        made.blocks += [_prompt(content, names[content.model]), _answers(content), _ahead(content)]
    return made


def _prompt(content: PrefillResult, name: str) -> Table:
    return Table(
        ["memory", "prompt", "ms to first token", "× dense", "95 % interval", "peak MiB", "reading", "held", "grown"],
        [
            [
                row.label,
                f"{row.length:,}",
                figure(row.ttft_ms, ",.1f"),
                figure(row.ttft_ratio),
                between(row.ttft_low, row.ttft_high, ".2f"),
                *(
                    figure(getattr(row, key) and getattr(row, key) / MEBIBYTE, ",.1f")
                    for key in ("peak_bytes", "reading_bytes", "bytes_held", "bytes_grown")
                ),
            ]
            for row in content.rows
        ],
        caption=f"{name}, {content.dtype}, {content.device}, threads: {content.threads}. × dense: median over "
        f"rounds in which all took turns; MiB: peak of the process with {content.weights_bytes / MEBIBYTE:,.0f} of "
        "weights; reading: the part of the peak that the prompt took; held: by the memory afterwards; grown: by how "
        "much the process has grown.",
    )


def _answers(content: PrefillResult) -> Table:
    return Table(
        ["memory", "prompt", "answer", "ms/step", "× dense", "95 % interval", "total s", "× dense", "95 % interval"],
        [
            [
                row.label,
                f"{row.length:,}",
                f"{part.answer:,}",
                figure(part.step_ms),
                figure(part.step_ratio),
                between(part.step_low, part.step_high, ".2f"),
                figure(part.total_ms and part.total_ms / 1000),
                figure(part.total_ratio),
                between(part.total_low, part.total_high, ".2f"),
            ]
            for row in content.rows
            for part in row.answers
        ],
        caption="ms/step: a step at the end of an answer of that many tokens; total: the whole answer with its prompt.",
    )


def _ahead(content: PrefillResult) -> Table:
    return Table(
        ["earlier first token", "other", "prompt", "falls behind at", "95 % interval"],
        [
            [
                pair.first,
                pair.second,
                f"{pair.length:,}",
                tokens_or_never(pair.crossover),
                pair.interval,
            ]
            for pair in content.crossovers
        ],
        words=2,
        caption="The shortest answer, in tokens, that takes the first one longer than the other. An interval from 0 "
        "means that the order of the first tokens is uncertain.",
    )


def longcontext(inputs: Inputs) -> Section | None:
    """`sink-eval longcontext`: tasks that need the prompt; cells that dense cannot do are marked "floor"."""
    found = inputs.of(LongContextResult)
    if not found:
        return None
    names = short_names(content.model for content in found)
    made, paired = Section("longcontext", "Long prompts"), ("− dense", "interval")
    for content in found:
        made.blocks.append(
            Table(
                [
                    *("task", "memory", "length", "score", *paired, "exact", "nats", *paired),
                    *("MiB held", "kept %"),
                ],
                [_cell(row) for row in content.rows],
                words=2,
                caption=f"{names[content.model]}: the question is {content.rows[0].question} the compressed "
                "prompt; score: the task's metric; exact: share of the questions for which greedy choices give the "
                "whole right answer; nats: of the right answer; − dense: paired by context, 95 % intervals; kept: "
                "share of dense's keys and values; floor: dense cannot do the task either.",
            )
        )
    return made


def _cell(row: LongContextRow) -> list[str]:
    front = [row.task, row.label, f"{row.length:,}"]
    if row.floor and row.score is None:
        return [*front, "floor", *["–"] * 8]
    return [
        *front,
        figure(row.score, ".3f") + (" (floor)" if row.floor else ""),
        figure(row.score_difference, "+.3f"),
        between(row.score_low, row.score_high, "+.3f"),
        figure(row.exact, ".3f"),
        figure(row.nll, ".3f"),
        figure(row.nll_difference, "+.3f"),
        between(row.nll_low, row.nll_high, "+.3f"),
        figure(row.bytes_held and row.bytes_held / MEBIBYTE, ",.1f"),
        _percent(row.kept_share),
    ]
