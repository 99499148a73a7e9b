"""The files that a command writes: the result as JSON with its command line, and tables as CSV."""

from __future__ import annotations

import argparse
import datetime
import platform
import shlex
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from sinkmodel.console import say
from sinkmodel.files import write_json
from sinkmodel.secrets import redacted

OUTPUTS = ("--json", "--csv", "--maps", "--plot")  # options for output paths; each takes one value
PACKAGES = ("torch", "transformers")  # packages whose versions a result records


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
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    typed = redacted(options.command_line)
    write_json(options.json, {**content, "command_line": typed, "date": date, "versions": versions})
    say(f"wrote {options.json}")


def command_line(argv: Sequence[str]) -> str:
    """The command line for the result file, without output paths, so that the same measurement gives the same bytes."""
    words = list(argv)
    for option in OUTPUTS:
        while option in words:
            place = words.index(option)
            del words[place : place + 2]
        words = [word for word in words if not word.startswith(f"{option}=")]
    return shlex.join(["sink-eval", *words])
