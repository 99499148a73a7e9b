"""What a corpus is: documents in an order that is always the same, each with a cursor.

A cursor is a small JSON value. Reading resumes from it with that document, in another process on another day.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

Document = tuple[Any, Iterable[str]]  # (cursor, pieces of its text); the pieces are read before the next is asked for
Stamp = list[Any]  # name, bytes, time of change


class Corpus(Protocol):
    skipped: int
    """Rows without text (null, empty or blank) that `documents` has passed over since its cursor."""

    def identity(self) -> dict[str, Any]:
        """What tells this corpus from another: two preparations with equal identities read the same text."""

    def documents(self, cursor: Any = None) -> Iterator[Document]: ...

    def strands(self) -> list[Generator[Document]]:
        """Parts of the corpus to take a sample from, so that the sample is not all of one file.

        Nothing is open before a part is begun. A part that is not read to its end must be closed.
        """

    def fraction(self) -> float | None:
        """Share of the corpus read so far; None where its size is not known."""


def stamp(path: Path, name: str) -> Stamp:
    """A file's name, size and time of change, as make and rsync tell an edited file, whatever its size, from the old.

    No digest: one of the whole file takes as long as reading terabytes, one of its ends misses what is between. A file
    that was merely touched counts as another, which costs a new folder; two texts mixed in one would cost more.
    """
    there = path.stat()
    return [name, there.st_size, there.st_mtime_ns]
