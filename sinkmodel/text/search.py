"""Find the text files of a folder or pattern, and list those that are left out."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sinkmodel.errors import UserError
from sinkmodel.text.documents import JSON_LINES, KINDS, kind_of, lost_link
from sinkmodel.text.json_lines import first_rows

SHOWN = 3  # most file names per suffix in a message


@dataclass
class Found:
    """Text files in reading order, and the files that were left out."""

    files: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)

    def summary(self) -> str:
        """The files that were left out, by suffix, as in `.csv: a.csv, b.csv and 7 more; .md: notes.md`."""
        by_suffix: dict[str, list[str]] = {}
        for path in self.left_out:
            suffix = "".join(path.suffixes[-2:]) or "no suffix"
            form = " (not lines of text)" if kind_of(path)[0] == ".json" else ""
            by_suffix.setdefault(suffix + form, []).append(re.sub(r"[\x00-\x1f]", "?", path.name))
        return "; ".join(
            f"{suffix}: {', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN:,} more' if names[SHOWN:] else ''}"
            for suffix, names in sorted(by_suffix.items())
        )


def find_text_files(name: str, text_key: str = "text") -> Found:
    """Resolve a name: the file itself, the files below a folder, or all files that match a pattern.

    The kind of a file is determined by its name, or, for a link, else by the name of its target. The files of a folder
    or pattern are sorted by name. Hidden files and folders are skipped, links to folders are followed. A `.json` file
    is left out if it is not JSON lines, or if it is a single object without `text_key`, such as a settings file.

    Raises UserError if there is nothing, or no text, and for a text file that is a broken link.
    """
    path = Path(name)
    if path.is_dir():
        found = _sorted_out(_below(path), text_key)
    elif path.exists() or not glob.has_magic(name):
        return Found([path])
    else:
        matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        files = [file for match in matches for file in (_below(match) if match.is_dir() else [match])]
        found = _sorted_out(files, text_key)
    if not found.files:
        what = f"the folder {name} holds" if path.is_dir() else f"{name} matches"
        there = f" (there is {found.summary()})" if found.left_out else ""
        raise UserError(f"{what} no {', '.join(list(KINDS)[:-1])} or {list(KINDS)[-1]} file{there}; give another")
    return found


def find_json_lines(folder: Path) -> Found:
    """The files directly in a folder that are named like JSON lines, and its other files that are not hidden."""
    found = Found()
    for path in sorted(folder.iterdir()):
        if kind_of(path)[0] in JSON_LINES and (path.is_dir() or _is_text(path)):
            found.files.append(path)
        elif not path.name.startswith(".") and not path.is_dir():
            found.left_out.append(path)
    return found


def name_without_suffixes(path: Path) -> str:
    """`a.b` for both a.b.jsonl and a.b.jsonl.gz."""
    _, compression = kind_of(path)
    return path.with_suffix("").stem if path.suffix.lower() == compression else path.stem


def _sorted_out(files: Iterable[Path], text_key: str) -> Found:
    found = Found()
    for path in dict.fromkeys(files):
        (found.files if _is_text(path, text_key) else found.left_out).append(path)
    return found


def _is_text(path: Path, text_key: str | None = None) -> bool:
    kind, compression = kind_of(path)
    if kind is not None and path.is_symlink() and not path.exists():
        raise lost_link(path)
    if kind is None or not path.is_file():
        return False
    if kind != ".json":
        return True
    rows = first_rows(path, compression)
    return rows is not None and not (len(rows) == 1 and text_key is not None and text_key not in rows[0])


def _below(folder: Path) -> list[Path]:
    """The files below a folder, sorted, including broken links. Each real folder is visited once."""
    files: list[Path] = []
    seen: set[str] = set()

    def stop(error: OSError) -> None:
        raise error

    for here, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(files)
