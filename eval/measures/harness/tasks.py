"""Loads tasks by name: lm-eval's own, which include the paper's seven, or one for each .jsonl file of a folder.

FOLDER/NAME.jsonl is the task NAME. If NAME is one of the paper's seven, the file holds unchanged rows of that task's
data set, and lm-eval's task is used with its prompts and metrics. Any other file is read by `files`. A name without a
file is a task or group of lm-eval; its data come from the Hub or from the Hub client's local cache.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask

from eval.measures.harness.files import in_memory, task_config
from eval.measures.harness.paper import PAPER
from sinkmodel.console import say
from sinkmodel.errors import UserError, first_line
from sinkmodel.hub_token import hub_token
from sinkmodel.text.json_lines import Row, read_json_lines


def load_tasks(names: list[str], files: dict[str, Path]) -> dict[str, Any]:
    """lm-eval's task objects by name, in order, with their questions loaded; a group is replaced by its tasks.

    Raises UserError for a file with an invalid row, an unknown name, or data that cannot be loaded.
    """
    rows = {name: [row for _, row in read_json_lines(path)] for name, path in files.items()}
    for name, of_task in rows.items():
        if not of_task:
            raise UserError(f"{files[name]} has no rows; give at least one, or remove the file from the folder")
    ours = {name: task_config(path, rows[name]) for name, path in files.items() if name not in PAPER}
    manager = _manager([name for name in names if name not in ours])
    tasks: dict[str, Any] = {}
    for name in names:
        if name in ours:
            with quiet():
                tasks[name] = ConfigurableTask(config={"task": name, **ours[name]})
        elif name in files:
            tasks[name] = _lm_evals_on_file(manager, name, files[name], rows[name])
        else:
            tasks.update(_lm_evals(manager, name))
    for name, task in tasks.items():
        task.set_config(key="num_fewshot", value=0)
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {name} runs code that the model writes, or uses images or sound; leave it out")
    return tasks


# ------------------------------------------------------------------------------------------------------ lm-eval's tasks


def _manager(names: list[str]) -> Any:
    """lm-eval's index of tasks: only the paper's folders if these are enough, else all 14,000 (half a minute)."""
    root = Path(lm_eval.tasks.__file__).parent
    if all(name in PAPER for name in names):
        folders = [str(root / folder) for folder in sorted({PAPER[name].folder for name in names})]
        return lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)
    say("reading lm-eval's index of tasks")
    with quiet():
        manager = lm_eval.tasks.TaskManager()
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            guess = f"did you mean {close[0]}?" if close else "`lm-eval ls tasks` lists all tasks"
            raise UserError(f"lm-eval has no task {name}, and --data has no file {name}.jsonl; {guess}")
    return manager


def _lm_evals(manager: Any, name: str) -> dict[str, Any]:
    say(f"loading the data of {name}")
    hub_token()  # raises UserError if the token cannot be sent
    try:
        with quiet():
            return manager.load([name])["tasks"]
    except Exception as error:  # missing data raise anything, from ConnectionError to ImportError
        raise UserError(
            f"task {name}: its data cannot be loaded ({_named(error)}); load it once on a machine with a network and "
            f"set HF_HOME to that copy, or give the rows of its data set as {name}.jsonl in the folder of --data"
        ) from None


def _lm_evals_on_file(manager: Any, name: str, path: Path, rows: list[Row]) -> Any:
    """lm-eval's task with its questions from a file; all its requests are built, to find a row that does not fit."""
    for number, row in enumerate(rows, 1):
        missing = [key for key in PAPER[name].keys.split() if key not in row]
        if missing:
            raise UserError(
                f"{path}, row {number}: no key '{missing[0]}', which the rows of {name} have; copy them unchanged "
                "from its data set, or give the file another name"
            )
    spec = {"task": name, "training_split": None, "validation_split": None, **in_memory(rows)}
    try:
        with quiet():
            task = manager.load([{"group": "local", "task": [spec]}])["tasks"][name]
            task.build_all_requests()
    except Exception as error:  # lm-eval's templates and functions raise anything on an unexpected row
        raise UserError(
            f"{path}: lm-eval's {name} cannot read these rows ({_named(error)}); copy them unchanged from its "
            "data set, or give the file another name"
        ) from None
    return task


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and logs of lm-eval and its libraries; everything is restored afterwards."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
