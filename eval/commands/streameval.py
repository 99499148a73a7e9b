"""`sink-eval streameval`: does a stream remember what it read some time ago, and does it still answer questions well?

`eval.measures.streams.streameval` measures it.
"""

from __future__ import annotations

import argparse

from eval.commands import options as shared
from eval.commands.checks import check_outputs
from eval.commands.output import give_result
from eval.commands.tables import keys_seen, new_table, number, show, span
from eval.policies.options import BORROWED, check
from sinkmodel.errors import UserError
from sinkmodel.imports import slow_imports
from sinkmodel.parser import path_of, positive, whole
from sinkmodel.results.streams import LinesResult, QuestionsResult, StreamEvalResult

DESCRIPTION = "What a stream remembers: StreamEval's lines by distance, and questions answered one after the other."
EXAMPLE = "sink-eval streameval --model runs/sink --budgets 256 512 --distances 5 10 20 --samples 10 --queries 20"
# The paper's values, except `distractors` (they only rank an answer) and `rows` (it only changes the speed).
LINES = {"distances": [20], "every": 10, "samples": 100, "queries": 100, "distractors": 9, "rows": 8}
MADE = 1000  # made-up questions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    parser.add_argument("--task", choices=("lines", "questions"), default="lines", help="default: lines, StreamEval")
    shared.add_budgets(parser, [1024], "keys a query sees, including its own and the sinks (default: 1024)")
    parser.add_argument(
        "--sinks",
        type=whole,
        nargs="+",
        metavar="S",
        help="first keys that are never evicted (default: 0 and the number of the model's own sinks, or "
        f"{BORROWED} if it has none)",
    )
    shared.add_policies(parser, "window (if --sinks has a 0) and sink")
    lines = parser.add_argument_group("lines")
    lines.add_argument(
        "--distances",
        type=positive,
        nargs="+",
        metavar="D",
        help="lines from the one asked for to the latest (default: 20)",
    )
    lines.add_argument("--every", type=positive, metavar="N", help="lines from a query to the next (default: 10)")
    lines.add_argument("--samples", type=positive, metavar="N", help="streams (default: 100)")
    lines.add_argument(
        "--distractors",
        type=positive,
        metavar="N",
        help="other numbers that the answer is ranked against (default: 9)",
    )
    lines.add_argument(
        "--rows", type=positive, metavar="N", help="streams computed together; changes only the speed (default: 8)"
    )
    questions = parser.add_argument_group("questions")
    questions.add_argument(
        "--file",
        type=path_of,
        metavar="FILE.jsonl",
        help="questions with choices and answer (a number from 0, or the text), or ARC's own rows (default: made up)",
    )
    parser.add_argument(
        "--queries",
        type=positive,
        metavar="N",
        help=f"queries of each stream (default: lines 100; questions all of the file, or {MADE} made up)",
    )
    shared.add_seed(parser, "the samples")
    shared.add_common(parser)


def run(options: argparse.Namespace) -> None:
    check(options.sinks or [0], min(options.budgets), "--budgets")
    _settle_task(options)
    check_outputs(options)
    with slow_imports():
        from eval.measures.streams import streameval

    result = streameval.run(options)
    give_result(options, result, lambda: print_table(options, result))


def _settle_task(options: argparse.Namespace) -> None:
    """Fill in the defaults of the chosen task. Raises UserError for an option of the other task."""
    if options.task == "lines":
        if options.file is not None:
            raise UserError("--file is only for questions; add --task questions")
        for name, value in LINES.items():
            if getattr(options, name) is None:
                setattr(options, name, value)
        return
    if options.file is None and options.queries is None:
        options.queries = MADE
    for name in LINES.keys() - {"queries"}:
        if getattr(options, name) is not None:
            raise UserError(f"--{name} is only for --task lines; leave it out")


# ------------------------------------------------------------------------------------------------------ what is shown


def print_table(options: argparse.Namespace, result: StreamEvalResult) -> None:
    if isinstance(result, LinesResult):
        print_lines(options, result)
    elif isinstance(result, QuestionsResult):
        print_questions(options, result)


def print_lines(options: argparse.Namespace, result: LinesResult) -> None:
    tokens, distractors = span(result.line_tokens_least, result.line_tokens_most), result.distractors or 0
    table = new_table(
        f"{options.model}, {options.dtype}: {result.samples} samples × {result.queries} queries, one every "
        f"{result.every} lines of {tokens} tokens",
        "back: from the line asked for to the end of the answer; kept: share of queries whose line stays whole in the "
        f"cache until then; accuracy: greedy decoding gives the answer of {result.answer_tokens} tokens; nats: of "
        f"the answer; rank: of the answer among itself and {distractors} other numbers of the stream, by "
        f"chance {distractors / 2 + 1:g}; "
        "±: standard error over samples",
        ["policy"],
        ["keys seen", "lines back", "tokens back", "kept", "accuracy", "±", "nats", "±", "rank", "±", "tokens/s"],
    )
    for row in result.rows:
        table.add_row(
            row.label,
            keys_seen(row),
            str(row.distance),
            span(row.tokens_back_least, row.tokens_back_most),
            number(row.kept, ".0%"),
            *(number(getattr(row, key), ".4f") for key in ("accuracy", "accuracy_stderr")),
            *(number(getattr(row, key), ".3f") for key in ("nll", "nll_stderr", "rank", "rank_stderr")),
            f"{row.tokens_per_second:,.0f}",
        )
    show(table)


def print_questions(options: argparse.Namespace, result: QuestionsResult) -> None:
    table = new_table(
        f"{options.model}, {options.dtype}: {result.questions} questions, {options.file or 'made up'}",
        "one-shot: each question in an empty cache; the others: one after the other in one stream, each followed by "
        "its right answer; accuracy: of the choice with the highest log-likelihood per character; − one-shot: paired "
        "by question; nats: of the right choice; ±: standard error over questions",
        ["policy"],
        ["keys seen", "tokens", "accuracy", "±", "− one-shot", "±", "nats", "±", "tokens/s"],
    )
    for row in result.rows:
        table.add_row(
            row.label,
            keys_seen(row),
            f"{row.tokens:,}",
            *(number(getattr(row, key), ".4f") for key in ("accuracy", "accuracy_stderr")),
            number(row.difference, "+.4f"),
            number(row.difference_stderr, ".4f"),
            *(number(getattr(row, key), ".3f") for key in ("nll", "nll_stderr")),
            f"{row.tokens_per_second:,.0f}",
        )
    show(table)
