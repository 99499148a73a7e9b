"""The first screen of a report: what it is, and what its results say, a sentence for each model and measurement."""

from __future__ import annotations

from collections.abc import Iterator

from eval.report.blocks import Note, Section, between, figure, short_names
from eval.report.inputs import Inputs
from sinkmodel.perplexity import perplexity
from sinkmodel.results.memories import MemoriesResult, MemoryRow
from sinkmodel.results.perplexity import PerplexityResult, PerplexityRow
from sinkmodel.results.verdict import VerdictResult

WHAT = """\
How language models do when their cache keeps only some tokens: a few first ones (sinks) and the latest in an endless
stream, or the important ones of a long prompt"""


def section(inputs: Inputs) -> Section:
    results, runs = len(inputs.results), len(inputs.runs)
    basis = [f"{n} {word}{'s' if n != 1 else ''}" for n, word in ((results, "result"), (runs, "training run")) if n]
    made = Section("summary", "In short")
    made.blocks.append(Note(f"{' '.join(WHAT.split())}. From {' and '.join(basis) or 'attention maps alone'}."))
    made.blocks += [*_streams(inputs), *_memories(inputs)]
    if not inputs.of(VerdictResult):
        text = (
            "Whether one trained sink is as good as four borrowed tokens is not measured here. To measure it: "
            "sink-eval verify --sink MODEL --vanilla TWIN --text FILE"
        )
        made.blocks.append(Note(text, "plain", "No verdict yet"))
    return made


def _streams(inputs: Inputs) -> Iterator[Note]:
    found = inputs.of(PerplexityResult)
    names = short_names(content.model for content in found)
    for content in found:
        rows = [row for row in content.rows if row.nll_after_overflow is not None]
        dense, window = (next((row for row in rows if row.policy == name), None) for name in ("dense", "window"))
        sinks = min((row for row in rows if row.policy == "sink"), key=_nats, default=None)
        parts = [
            f"{_ppl(row)} {how}"
            for row, how in (
                (window, "with the window alone"),
                (sinks, f"with {sinks.sinks} sink{'s' if sinks.sinks != 1 else ''}" if sinks else ""),
                (dense, "with all keys"),
            )
            if row is not None
        ]
        if parts:
            text = f"After the first eviction, at {content.budget:,} keys, the perplexity is {', '.join(parts)}."
            yield Note(text, "plain", names[content.model])


def _memories(inputs: Inputs) -> Iterator[Note]:
    found = inputs.of(MemoriesResult)
    names = short_names(content.model for content in found)
    for content in found:
        rows = [row for row in content.rows if row.difference is not None and row.memory != "dense"]
        if rows:
            least, most = min(rows, key=_difference), max(rows, key=_difference)
            text = f"After prompts of {content.prompt:,} tokens, the memory that loses least against the full cache is "
            text += _row(least) + (f"; the one that loses most is {_row(most)}" if most is not least else "") + "."
            yield Note(text, "plain", names[content.model])


def _row(row: MemoryRow) -> str:
    interval = between(row.low, row.high, "+.4f")
    return f"{row.label} with {figure(row.difference, '+.4f')} nats per token {interval}"


def _ppl(row: PerplexityRow) -> str:
    return figure(perplexity(row.nll_after_overflow))


def _nats(row: PerplexityRow) -> float:
    assert row.nll_after_overflow is not None
    return row.nll_after_overflow


def _difference(row: MemoryRow) -> float:
    assert row.difference is not None
    return row.difference
