"""`sink-eval latency --prefill`: the cost of reading a prompt with each KV memory, and of the answer's steps after it.

`eval.measures.prefill.prefill` measures it.
"""

from __future__ import annotations

import argparse
from typing import Any

from eval.commands import options as shared
from eval.commands.checks import check_outputs, check_two_names
from eval.commands.output import give_result
from eval.commands.tables import interval_of, mebibytes, new_table, number, percent, show
from eval.measures.memories.names import ALONE, NAMM, PUBLISHED
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.files import write_csv
from sinkmodel.imports import slow_imports
from sinkmodel.parser import positive
from sinkmodel.results.latency import Crossover, PrefillResult, PrefillRow, tokens_or_never
from sinkmodel.results.schema import to_json

NAMES = ("dense", *ALONE, *PUBLISHED, NAMM)
BUDGETS = [1024]
DEFAULTS: dict[str, Any] = {
    "length": [2048],
    "memories": ["dense", *ALONE],
    "layer": None,
    "artefact": None,
    "answers": [1, 128, 1024],
    "rounds": 5,
    "csv": None,
}
SLACK = 16 * 2**20  # bytes by which a process may grow before it is reported


def add_arguments(group: Any) -> None:
    group.add_argument(
        "--length",
        type=positive,
        nargs="+",
        metavar="N",
        help="tokens of the prompt, without the model's sinks (default: 2048)",
    )
    group.add_argument(
        "--memories",
        nargs="+",
        choices=NAMES,
        metavar="MEMORY",
        help=f"one or more of {', '.join(NAMES)} (default: all but the last three; dense is always measured)",
    )
    shared.add_layer(group, "13/32 of all layers")
    shared.add_artefact(group)
    group.add_argument(
        "--answers",
        type=positive,
        nargs="+",
        metavar="N",
        help="answer lengths in tokens: steps are timed there, and total times reported (default: 1 128 1024)",
    )
    group.add_argument(
        "--rounds",
        type=positive,
        metavar="N",
        help="times that every side reads the prompt (default: 5, the fewest for an interval)",
    )
    shared.add_csv(group)


def run(options: argparse.Namespace) -> None:
    _check(options)
    with slow_imports():
        from eval.measures.prefill import prefill

    result = prefill.run(options)
    if options.csv is not None:
        flat = list(map(flat_row, result.rows))
        write_csv(options.csv, list(flat[0]), [list(row.values()) for row in flat])
        say(f"wrote {options.csv}")
    give_result(options, result, lambda: print_tables(result))


def flat_row(row: PrefillRow) -> dict[str, Any]:
    """A row without lists, for CSV: the values of an answer have the answer's length at the end of their names."""
    flat = to_json(row)
    for part in flat.pop("answers"):
        answer = part.pop("answer")
        flat |= {f"{key}_{answer}": value for key, value in part.items()}
    return flat


# ---------------------------------------------------------------------------------------------------- what is checked


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for options that cannot work, before a model is loaded."""
    check_outputs(options, "csv")
    check_two_names(options)
    if set(options.memories) == {"dense"}:
        raise UserError("--memories has only dense, so there is nothing to compare; add a memory, such as snapkv")
    if options.layer is not None and "gemfilter" not in options.memories:
        raise UserError("--layer is only for gemfilter; add gemfilter to --memories, or leave --layer out")
    budgeted = set(options.memories) - {"dense", NAMM}
    for budget in options.budgets if budgeted else ():
        if budget >= min(options.length):
            raise UserError(
                f"--budgets {budget} keeps every token of --length {min(options.length)}; lower it, or raise --length"
            )


# ------------------------------------------------------------------------------------------------------ what is shown


def print_tables(result: PrefillResult) -> None:
    head = f"{result.model}, {result.dtype}, {result.device}, {result.threads} threads"
    for length in dict.fromkeys(row.length for row in result.rows):
        rows = [row for row in result.rows if row.length == length]
        _print_prompt(f"{head}: a prompt of {length:,} tokens", rows, result.weights_bytes)
        _print_answers(rows)
        _print_crossovers([pair for pair in result.crossovers if pair.length == length])
    report_growth(result.rows)


def report_growth(rows: list[PrefillRow]) -> None:
    """Report each memory after which the process has kept clearly more bytes than the memory holds."""
    for row in rows:
        grown, held = row.bytes_grown or 0, row.bytes_held or 0
        if grown > 1.01 * held + SLACK:
            more = (grown - held) / 2**20
            prompt = f"the prompt of {row.length:,} tokens"
            say(f"{row.label}: after {prompt} the process has kept {more:,.0f} MiB more than the memory holds")


def _print_prompt(title: str, rows: list[PrefillRow], weights: int) -> None:
    table = new_table(
        title,
        "ms to the first token: median; × dense: ratio to dense, median over rounds in which all took turns [95 % "
        f"interval by bootstrap over them]; peak: of the process, including {weights / 2**20:,.0f} MiB of weights; "
        "reading: the part of the peak that reading the prompt added; held: by the memory afterwards; kept: share of "
        "dense's keys and values; grown: by how much the process is larger than before",
        ["memory"],
        ["ms to first token", "× dense", "interval", "peak MiB", "reading", "held", "kept %", "grown"],
    )
    for row in rows:
        table.add_row(
            row.label,
            f"{row.ttft_ms:,.1f}",
            number(row.ttft_ratio, ".2f"),
            interval_of(row.ttft_low, row.ttft_high),
            mebibytes(row.peak_bytes, ",.0f"),
            mebibytes(row.reading_bytes, ",.1f"),
            mebibytes(row.bytes_held, ",.1f"),
            percent(row.kept_share, ".0f"),
            mebibytes(row.bytes_grown, ",.1f"),
        )
    show(table)


def _print_answers(rows: list[PrefillRow]) -> None:
    table = new_table(
        "answers",
        "ms/step: of a step at the end of such an answer; total: to its last token, with step costs interpolated "
        "linearly between the measured places",
        ["memory"],
        ["answer", "ms/step", "× dense", "interval", "total s", "× dense", "interval"],
    )
    for row in rows:
        for part in row.answers:
            table.add_row(
                row.label,
                f"{part.answer:,}",
                f"{part.step_ms:,.2f}",
                number(part.step_ratio, ".2f"),
                interval_of(part.step_low, part.step_high),
                number(part.total_ms and part.total_ms / 1000, ",.2f"),
                number(part.total_ratio, ".2f"),
                interval_of(part.total_low, part.total_high),
            )
    show(table)


def _print_crossovers(pairs: list[Crossover]) -> None:
    table = new_table(
        "who is ahead",
        "falls behind at: the shortest answer, in tokens, that takes the first one longer than the other; never: its "
        "steps cost no more; an interval from 0 means that the order of the first tokens is uncertain; after the "
        "longest of --answers the cost per step is taken as constant",
        ["earlier first token", "other"],
        ["falls behind at", "interval"],
    )
    for pair in pairs:
        table.add_row(pair.first, pair.second, tokens_or_never(pair.crossover), pair.interval)
    show(table)
