"""The result file of a command: JSON with the command line, the date and the versions."""

from __future__ import annotations

import argparse
import datetime
import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata

from sinkmodel.console import say
from sinkmodel.results.files import write_result
from sinkmodel.results.parts import Result
from sinkmodel.secrets import redacted

OUTPUTS = ("--json", "--csv", "--maps", "--plot")  # options for output paths; each takes one value
PACKAGES = ("torch", "transformers")  # packages whose versions a result records, beside the library of products


def give_result(options: argparse.Namespace, result: Result, show_tables: Callable[[], None]) -> None:
    """Write the result file, then print the tables. The tables are printed even if the file cannot be written."""
    try:
        _write(options, result)
    finally:
        show_tables()


def _write(options: argparse.Namespace, result: Result) -> None:
    """Write the result as JSON to --json, if given, and add the command line, the date and the versions."""
    if options.json is None:
        return
    from sinkmodel.products import used

    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
    versions["products"] = used()
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    typed = redacted(options.command_line)
    write_result(options.json, replace(result, command_line=typed, date=date, versions=versions))
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
