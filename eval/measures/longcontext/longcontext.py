"""What a memory remembers of a long prompt, on tasks that need the prompt (`sink-eval longcontext`).

    RULER       needles, variable tracking, common and frequent words (`sinkmodel.tasks.ruler`)
    own text    passages, key-value recall and verbatim recall from --text (`sinkmodel.tasks.own_text`)
    LongBench   local files in its format (`eval.measures.longcontext.longbench`)

All memories read the same samples. Sample i of a task depends only on --seed, the task, i, --length, --text and the
tokenizer. `measure` computes the numbers and the floor, `answers` asks the questions.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from eval.measures.loading import load
from eval.measures.longcontext.answers import Reader
from eval.measures.longcontext.longbench import longbench_cell, read_longbench
from eval.measures.longcontext.measure import LEVEL, Side, measure_cell
from eval.measures.memories.choice import check_memories, check_namm, memory_maker, namm_rows
from eval.measures.memories.names import NAMM
from eval.policies.policy import end_of
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.loading import LoadedModel
from sinkmodel.memories import BUDGETED, make_memory
from sinkmodel.progress import CountedProgress
from sinkmodel.results.parts import Text
from sinkmodel.results.tasks import LongContextResult, LongContextRow
from sinkmodel.scoring import check_decoder
from sinkmodel.tasks import own_text, ruler
from sinkmodel.tasks.cells import FLOOR_GAIN, FLOOR_SCORE, Cell, made_cell
from sinkmodel.tasks.samples import Setting, Task
from sinkmodel.tasks.text import read_own_text
from sinkmodel.text.json_lines import Row

ENOUGH = 5  # fewest contexts for an interval
SETTINGS = (
    *("question", "samples", "distractors", "answer_tokens"),
    *("sinks", "window", "positions", "layer", "artefact", "seed"),
)


def run(options: argparse.Namespace, give: Callable[[LongContextResult], None]) -> None:
    """Pass the result to `give`, also if a later cell fails, or after Ctrl-C, once a row is measured.

    `options` are those of `eval.commands.longcontext`.
    """
    tasks = _tasks(options)
    _check(options)
    text, texts = read_own_text(options.text) if options.text else (None, [])
    rows_of_files, files = read_longbench(options.longbench, options.samples)
    loaded = load(options)
    dense, others = _sides(loaded, options)
    _check_model(loaded, options)
    cells = _cells(loaded, options, tasks, text, rows_of_files)
    rows: list[LongContextRow] = []
    try:
        for row in _measure(loaded, options, cells, dense, others):
            rows.append(row)
    finally:
        if rows:
            give(_result(options, loaded, texts, files, rows))


def _measure(
    loaded: LoadedModel, options: argparse.Namespace, cells: Sequence[Cell], dense: Side, others: Sequence[Side]
) -> Iterator[LongContextRow]:
    reader = Reader(loaded)
    for place, cell in enumerate(cells, 1):
        label = f"{place}/{len(cells)} {cell.task} {cell.length}"
        yield from measure_cell(reader, cell, dense, others, options.question, options.seed, label)


def _result(
    options: argparse.Namespace,
    loaded: LoadedModel,
    texts: list[Text],
    files: list[Text],
    rows: list[LongContextRow],
) -> LongContextResult:
    return LongContextResult(
        model=options.model,
        sink_ids=loaded.sink_ids,
        **{key: getattr(options, key) for key in SETTINGS},
        level=LEVEL,
        floor_score=FLOOR_SCORE,
        floor_gain=FLOOR_GAIN,
        dtype=options.dtype,
        device=str(loaded.model.device),
        texts=texts,
        longbench=files,
        rows=rows,
    )


# ---------------------------------------------------------------------------------------------------- what is checked


def _tasks(options: argparse.Namespace) -> list[Task]:
    """The tasks of --tasks, with groups expanded. Raises UserError for an unknown task, or if --text is missing."""
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
    """Raise UserError for memories that cannot work with the options, before a model is loaded."""
    known = ["dense", *BUDGETED, NAMM]
    for name in options.memories or ():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"choose among {', '.join(known)}"
            raise UserError(f"there is no memory {name!r}; {remedy}")
    interval = check_namm(options, options.memories or ())
    if min(options.length) < interval:
        say(f"--artefact decides after {interval} tokens: in a prompt of --length {min(options.length)} namm keeps all")
    check_memories(options, _budgeted(options))
    if options.samples < ENOUGH:
        say(f"--samples {options.samples}: fewer than {ENOUGH} contexts give no interval")


def _sides(loaded: LoadedModel, options: argparse.Namespace) -> tuple[Side, list[Side]]:
    """Dense, and the other memories: each at each budget, then namm and its controls."""
    sides = []
    for name in _budgeted(options):
        for budget in sorted(set(options.budgets)):
            sides.append(Side(name, budget, memory_maker(options, loaded.model, name, budget)()))
    if NAMM in (options.memories or ()):
        sides += [Side(name, None, make()) for name, make in namm_rows(options, loaded.model).items()]
    return Side("dense", None, make_memory("dense", loaded.model)), sides


def _budgeted(options: argparse.Namespace) -> list[str]:
    """The memories that are measured at each of --budgets."""
    return [name for name in dict.fromkeys(options.memories or BUDGETED) if name not in ("dense", NAMM)]


def _check_model(loaded: LoadedModel, options: argparse.Namespace) -> None:
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
    cells = []
    lengths, seed, room = sorted(set(options.length)), options.seed, options.answer_tokens
    total = len(lengths) * (options.samples * len(tasks) + sum(map(len, rows.values())))
    with CountedProgress("samples", "contexts", total) as progress:
        for length in lengths:
            setting = Setting(length, options.distractors, text)
            cells += [made_cell(loaded, task, setting, seed, options.samples, room, progress.add) for task in tasks]
            cells += [longbench_cell(loaded, *one, setting, seed, room, progress.add) for one in rows.items()]
    return cells
