"""`sink-eval zeroshot`: tasks of lm-eval, with the model's sink tokens in front of every window exactly once.

`eval.measures.harness.zeroshot` measures it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from eval.commands import options as shared
from eval.commands.checks import check_outputs
from eval.commands.output import give_result
from eval.commands.tables import new_table, number, show
from eval.measures.harness.paper import PAPER
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.imports import slow_imports
from sinkmodel.parser import path_of, positive
from sinkmodel.results.tasks import ZeroshotResult
from sinkmodel.text.search import find_json_lines, name_without_suffixes

DESCRIPTION = "Zero-shot tasks of lm-eval, with exactly one set of sinks in front, compared to stock lm-eval."
EXAMPLE = "sink-eval zeroshot --model models/sink --tasks paper"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help=f"names of lm-eval's tasks or groups, or of files in --data; paper: {', '.join(PAPER)} (default: all "
        "files in --data)",
    )
    parser.add_argument(
        "--data",
        type=path_of,
        metavar="FOLDER",
        help="folder in which NAME.jsonl is the task NAME: unchanged rows of a paper's task of that name, or rows with "
        "question, choices, answer; or context, continuation; or text",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="use the first N questions of each task (default: all)"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=4, metavar="N", help="windows in one forward; changes only the speed"
    )
    shared.add_common(parser)


def run(options: argparse.Namespace) -> None:
    check_outputs(options)
    names, files = choose(options.tasks, options.data)
    with slow_imports():
        from eval.measures.harness import zeroshot

    zeroshot.run(
        options,
        names,
        files,
        lambda result, sink: give_result(options, result, lambda: print_table(result, sink)),
    )


def choose(tasks: list[str] | None, folder: Path | None) -> tuple[list[str], dict[str, Path]]:
    """The names of the tasks in order, with "paper" expanded, and the files of those that have one."""
    files: dict[str, Path] = {}
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"--data {folder} is not a folder; give one with a file NAME.jsonl for each task")
        there = find_json_lines(folder)
        files = {name_without_suffixes(path): path for path in there.files}
        if there.left_out:
            say(f"{folder}: left out because they are not JSON lines: {there.summary()}")
        if not files:
            raise UserError(f"--data {folder} has no .jsonl file in it; put a file NAME.jsonl there for each task")
    elif tasks is None:
        raise UserError(
            "no task is named; give --tasks, such as --tasks paper, or --data with a folder of .jsonl files"
        )
    if tasks is None:
        return list(files), files
    names = list(dict.fromkeys(name for task in tasks for name in (PAPER if task == "paper" else [task])))
    return names, {name: files[name] for name in names if name in files}


def print_table(result: ZeroshotResult, sink: str) -> None:
    table = new_table(
        f"{result.model}, {result.dtype}, {sink}",
        "±: standard error over questions; paper: StreamingLLM's Table 4, 160M model with as many sink tokens",
        ["task", "metric"],
        ["questions", "stock", "±", "adapter", "±", "paper"],
    )
    for row in result.rows:
        metric = row.metric if row.filter == "none" else f"{row.metric}, {row.filter}"
        values = (row.stock, row.stock_stderr, row.adapter, row.adapter_stderr)
        numbers = [number(value, ".4g" if value and value >= 1 else ".4f") for value in values]
        table.add_row(row.task, metric, f"{row.questions:,}", *numbers, number(row.paper, ".3f"))
    show(table)
