"""The answer of `sink-eval verify`: is one trained sink worth four borrowed ones?"""

from __future__ import annotations

import functools
from dataclasses import replace

from eval.report.blocks import Chart, Note, Section, Table, between, figure, short_names, stream_name
from eval.report.charts import SIZE, panel
from eval.report.inputs import Inputs
from eval.report.plots import paint_intervals
from sinkmodel.results.verdict import VerdictResult

TITLE = "The verdict"
TONES = {"equivalent": "good", "better": "good", "worse": "bad", "undecided": "open"}
MEANING = {
    "equivalent": "the whole interval lies within the margin: the difference is too small to matter",
    "better": "the whole interval lies below zero, but not within the margin: the trained sink has the lower loss",
    "worse": "the whole interval lies above zero, but not within the margin: the trained sink has the higher loss",
    "undecided": "the interval contains zero and a difference that would matter",
}


def section(inputs: Inputs) -> Section | None:
    found = inputs.of(VerdictResult)
    if not found:
        return None
    made = Section("verdict", TITLE)
    for number, content in enumerate(found, 1):
        _add(made, content, number)
    return made


def _add(made: Section, content: VerdictResult, number: int) -> None:
    verdict, names = content.verdict, _names(content)
    pairs = [replace(row, first=names[row.first], second=names[row.second]) for row in content.each_pair]
    answer = verdict.answer if verdict.answer in TONES else "undecided"
    made.blocks.append(Note(sentence(content), TONES[answer], answer.capitalize()))
    made.blocks += [Note(warning, "warning", "Warning") for warning in content.warnings]
    rows = [verdict, *pairs, *content.comparisons]
    drawn = [
        (f"{row.first} − {row.second}" + ("" if row is verdict else f", {row.model}"), row)
        for row in rows
        if None not in (row.low, row.high, row.difference)
    ]
    if drawn and drawn[0][1] is verdict:
        alt = f"Intervals of {len(drawn)} paired differences against the margin. {sentence(content)}"
        size = (SIZE[0], 0.9 + 0.42 * len(drawn))
        paint = functools.partial(paint_intervals, rows=drawn, margin=content.margin)
        keys = ["model", "first", "second", "tokens", "difference", "low", "high", "answer", "speaks_of"]
        values = [[getattr(row, key) for key in keys] for row in rows]  # older results lack the last
        caption = f"{100 * content.level:g} % intervals of first − second; left of zero the first has the lower loss."
        made.blocks.append(Chart(f"verdict-{number}", [panel(alt, paint, size)], keys, values, caption))
    made.blocks.append(
        Table(
            ["model", "first", "second", "tokens", "difference", "interval", "answer"],
            [
                [
                    names.get(row.model, row.model),
                    row.first,
                    row.second,
                    figure(row.tokens, ",.0f"),
                    figure(row.difference, "+.4f"),
                    between(row.low, row.high, "+.4f"),
                    row.answer_cell,
                ]
                for row in rows
            ],
            words=3,
            caption="Paired differences in nats per token on the same tokens, after overflow; recompute and dense at "
            "positions spread over the texts. "
            + ("" if pairs else "They hold for these two runs: twins of other seeds may differ by more."),
        )
    )
    made.blocks.append(
        Table(
            ["model", "policy", "nats per token", "± standard error"],
            [
                [
                    names.get(row.run or "", names.get(row.model, row.model)),
                    stream_name(row),
                    figure(row.nll_after_overflow, ".4f"),
                    figure(row.stderr_after_overflow, ".4f"),
                ]
                for row in content.rows
            ],
            words=2,
            caption=f"Losses after overflow at a budget of {content.budget} keys.",
        )
    )


def _names(content: VerdictResult) -> dict[str, str]:
    """Short names of the runs and, if there is one pair, of the roles `sink` and `vanilla`."""
    roles = ("sink", "vanilla")
    if pairs := content.each_pair:
        return short_names([getattr(pair, role) for role in roles for pair in pairs])
    short = short_names([content.sink, content.vanilla])
    return {**short, **{role: short[getattr(content, role)] for role in roles}}


def sentence(content: VerdictResult) -> str:
    """The verdict in one sentence, then its basis, and what would give an answer if there is none."""
    verdict, margin = content.verdict, content.margin
    sink, vanilla = (
        f"the {role} models" if content.each_pair else getattr(content, role) for role in ("sink", "vanilla")
    )
    difference = verdict.difference
    if difference is None or verdict.low is None or verdict.high is None:
        return f"{sink} against {vanilla}: too little text for an interval, so there is no answer."
    more = "less" if difference < 0 else "more"
    text = (
        f"At a budget of {content.budget} keys {sink} ({verdict.first}) lost {abs(difference):.4f} "
        f"nats per token {more} than {vanilla} ({verdict.second}); {100 * content.level:g} % interval "
        f"{between(verdict.low, verdict.high, '+.4f')}, margin ±{margin:g}, {figure(verdict.tokens, ',.0f')} "
        f"tokens of {verdict.documents} document{'s' if verdict.documents != 1 else ''}"
    )
    why = verdict.why
    text += f": {MEANING[verdict.answer]}." if verdict.answer in MEANING and not why else "."
    if why:
        text += f" {why}."
    if verdict.resampled == "blocks":
        text += " The interval holds for these texts, not for others."
    if verdict.runs > 1:
        text += (
            f" Over {verdict.runs} pairs of runs; standard error over runs {figure(verdict.stderr_runs, '.4f')}, "
            f"over texts {figure(verdict.stderr_texts, '.4f')}."
        )
    if verdict.more_tokens:
        text += f" About {verdict.more_tokens:,.0f} more tokens would decide, if the difference stayed the same."
    elif verdict.more_tokens is None and verdict.answer == "undecided" and not why:
        text += " No amount of text decides this; more pairs of runs would."
    return text
