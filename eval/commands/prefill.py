"""`sink-eval latency --prefill`: the cost of reading a prompt with each KV memory, and of the answer's steps after it.

`eval.measures.prefill.prefill` measures it.
"""

from __future__ import annotations

import argparse
from typing import Any

from eval.commands import options as shared
from eval.commands.checks import check_outputs, check_two_names
from eval.commands.output import give_result
from eval.commands.tables import interval_of, new_table, number, show
from eval.measures.memories.names import ALONE, NAMM, PUBLISHED
from eval.wording import crossover_range, tokens_or_never
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.files import write_csv
from sinkmodel.parser import positive

NAMES = ("dense", *ALONE, PUBLISHED, NAMM)
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
        help=f"one or more of {', '.join(NAMES)} (default: all but the last two; dense is always measured)",
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
    from eval.measures.prefill import prefill

    content = prefill.run(options)
    if options.csv is not None:
        flat = list(map(flat_row, content["rows"]))
        write_csv(options.csv, list(flat[0]), [list(row.values()) for row in flat])
        say(f"wrote {options.csv}")
    give_result(options, content, lambda: print_tables(content))


def flat_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row without lists, for CSV: the values of an answer have the answer's length at the end of their names."""
    alone = {key: value for key, value in row.items() if key != "answers"}
    of_answers = {
        f"{key}_{part['answer']}": value for part in row["answers"] for key, value in part.items() if key != "answer"
    }
    return {**alone, **of_answers}


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


def print_tables(content: dict[str, Any]) -> None:
    head = f"{content['model']}, {content['dtype']}, {content['device']}, {content['threads']} threads"
    for length in dict.fromkeys(row["length"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["length"] == length]
        _print_prompt(f"{head}: a prompt of {length:,} tokens", rows, content["weights_bytes"])
        _print_answers(rows)
        _print_crossovers([pair for pair in content["crossovers"] if pair["length"] == length])
    report_growth(content["rows"])


def report_growth(rows: list[dict[str, Any]]) -> None:
    """Report each memory after which the process has kept clearly more bytes than the memory holds."""
    for row in rows:
        if row["bytes_grown"] > 1.01 * row["bytes_held"] + SLACK:
            more = (row["bytes_grown"] - row["bytes_held"]) / 2**20
            prompt = f"the prompt of {row['length']:,} tokens"
            say(f"{row['label']}: after {prompt} the process has kept {more:,.0f} MiB more than the memory holds")


def _print_prompt(title: str, rows: list[dict[str, Any]], weights: int) -> None:
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
            row["label"],
            f"{row['ttft_ms']:,.1f}",
            number(row["ttft_ratio"], ".2f"),
            interval_of(row["ttft_low"], row["ttft_high"]),
            f"{row['peak_bytes'] / 2**20:,.0f}",
            *(f"{row[key] / 2**20:,.1f}" for key in ("reading_bytes", "bytes_held")),
            f"{100 * row['kept_share']:.0f}",
            f"{row['bytes_grown'] / 2**20:,.1f}",
        )
    show(table)


def _print_answers(rows: list[dict[str, Any]]) -> None:
    table = new_table(
        "answers",
        "ms/step: of a step at the end of such an answer; total: to its last token, with step costs interpolated "
        "linearly between the measured places",
        ["memory"],
        ["answer", "ms/step", "× dense", "interval", "total s", "× dense", "interval"],
    )
    for row in rows:
        for part in row["answers"]:
            table.add_row(
                row["label"],
                f"{part['answer']:,}",
                f"{part['step_ms']:,.2f}",
                number(part["step_ratio"], ".2f"),
                interval_of(part["step_low"], part["step_high"]),
                f"{part['total_ms'] / 1000:,.2f}",
                number(part["total_ratio"], ".2f"),
                interval_of(part["total_low"], part["total_high"]),
            )
    show(table)


def _print_crossovers(pairs: list[dict[str, Any]]) -> None:
    table = new_table(
        "who is ahead",
        "falls behind at: the shortest answer, in tokens, that takes the first one longer than the other; never: its "
        "steps cost no more; an interval from 0 means that the order of the first tokens is uncertain; after the "
        "longest of --answers the cost per step is taken as constant",
        ["earlier first token", "other"],
        ["falls behind at", "interval"],
    )
    for pair in pairs:
        table.add_row(pair["first"], pair["second"], tokens_or_never(pair["crossover"]), crossover_range(pair))
    show(table)
