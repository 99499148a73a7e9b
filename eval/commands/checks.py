"""Checks of options that several commands share, before anything is loaded."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sinkmodel.errors import UserError
from sinkmodel.files import sha256_of
from sinkmodel.text.documents import KINDS


def check_outputs(options: argparse.Namespace, *names: str) -> None:
    """Raise UserError if a file of --json, or of the output options `names`, cannot be written."""
    for name in ("json", *names):
        check_output(f"--{name}", getattr(options, name))


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


def check_plot(path: Path | None) -> None:
    if path is not None and path.suffix.lower() != ".png":
        raise UserError(f"--plot {path} is not a .png; give a name that ends in .png")


def check_two_names(options: argparse.Namespace) -> None:
    """Raise UserError if --csv and --json are one file."""
    if options.csv is not None and options.csv == options.json:
        raise UserError(f"--csv and --json are both {options.csv}; give two names")


def check_files(files: Sequence[Path]) -> None:
    """Raise UserError if a file of --text does not exist or is given twice.

    The same text under two names would count as two texts and make every interval too narrow.
    """
    for file in files:
        if not file.is_file():
            problem = "is a folder, not a file" if file.is_dir() else "does not exist"
            raise UserError(f"{file} {problem}; --text takes {', '.join(KINDS)} files")
    if twice := repeated(files):
        raise UserError(f"--text has {twice} twice, which adds no text; give each file once")
    known: dict[str, Path] = {}
    sizes = [file.stat().st_size for file in files]
    same_size = Counter(sizes)
    for file, size in zip(files, sizes):
        if same_size[size] > 1 and (same := known.setdefault(sha256_of(file), file)) is not file:
            raise UserError(f"--text has {same} and {file}, which are the same text; give one of them")


def repeated(names: Sequence[str | Path]) -> str | None:
    """The first name of a file or folder that an earlier name already means, in any spelling; None if there is none."""
    seen = set()
    for name in names:
        place = str(Path(name).resolve()) if Path(name).exists() else str(name)
        if place in seen:
            return str(name)
        seen.add(place)
    return None
