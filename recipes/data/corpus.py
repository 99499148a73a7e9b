"""The interface of a corpus: documents in an order that is always the same, each with a cursor.

A cursor is a small JSON value. Another process can later resume reading with the document of that cursor.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

Document = tuple[Any, Iterable[str]]  # (cursor, its text in pieces); read the pieces before the next document
Stamp = list[Any]  # name, size in bytes, time of last change in ns


class Corpus(Protocol):
    skipped: int
    """Number of rows without text (null, empty or blank) that `documents` has skipped since its cursor."""

    def identity(self) -> dict[str, Any]:
        """Identifies the text: two preparations with equal identities read the same text."""

    def documents(self, cursor: Any = None) -> Iterator[Document]: ...

    def strands(self) -> list[Generator[Document]]:
        """Parts of the corpus to take a sample from, so that the sample does not come from one file alone.

        A part opens its file when it is first read. A part that is not read to its end must be closed.
        """

    def fraction(self) -> float | None:
        """Share of the corpus read so far; None if its size is not known."""


def stamp(path: Path, name: str) -> Stamp:
    """A file's name, size and time of last change, by which an edited file is recognised, as make and rsync do it.

    Not a digest: one of the whole file would mean reading terabytes, and one of its ends would miss changes between. A
    file that was only touched counts as changed. That costs a new folder; mixing two versions of a text would be worse.
    """
    there = path.stat()
    return [name, there.st_size, there.st_mtime_ns]
