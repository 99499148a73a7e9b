"""Local files as a corpus: files, folders and patterns, read one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

from recipes.data.corpus import Document, Stamp, stamp
from recipes.data.megatron import megatron_error, refuse_as_text
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.text import DocumentReader, Found, NoText, find_text_files
from sinkmodel.text.documents import kind_of


class LocalFiles:
    """Files, folders and glob patterns in the given order. A folder's files are sorted by name; each file is read once.

    A file without text adds nothing. A cursor is [number of the file, row in it].

    Args:
        text_key: key of the text in JSON objects, or its column in Parquet files.
        separator: text that ends a document inside a .txt file; with None each file is one document.
        option: the option that gave the names, for error messages.

    Raises UserError for a name that matches nothing, a folder without text files, and a .json file without `text_key`.
    """

    def __init__(self, names: list[str], text_key: str, separator: str | None = None, option: str = "input"):
        found = [_find(name, text_key, option) for name in names]
        given: dict[Path, Path] = {}  # resolved path -> path as given
        for path in (path for each in found for path in each.files):
            given.setdefault(path.resolve(), path)
        self.paths = list(given.values())
        self.left_out = "; ".join(summary for each in found if (summary := each.summary()))
        self.text_key, self.separator, self.option = text_key, separator, option
        for path in self.paths:
            self._read(path).check_key()
        self._stamps = [stamp(path, path.name) for path in self.paths]
        self.size = sum(size for _, size, _ in self._stamps)
        self.skipped = 0
        self._bytes_before = 0
        self._reader: DocumentReader | None = None

    def identity(self) -> dict[str, Any]:
        separator = {} if self.separator is None else {"separator": self.separator}
        return {"files": self._stamps, "text_key": self.text_key} | separator

    def put_first(self, begun: list[Stamp]) -> bool:
        """Move the files that an earlier run has begun to the front, in its order; the others keep their order.

        Returns False, and changes nothing, if one of these files has been edited or removed since.
        """
        left: dict[tuple[Any, ...], list[int]] = {}
        for number, here in enumerate(self._stamps):
            left.setdefault(tuple(here), []).append(number)
        numbers = [same.pop(0) for each in begun if (same := left.get(tuple(each)))]
        if len(numbers) < len(begun):
            return False
        order = numbers + sorted(number for same in left.values() for number in same)
        self.paths = [self.paths[number] for number in order]
        self._stamps = [self._stamps[number] for number in order]
        return True

    def documents(self, cursor: Any = None) -> Generator[Document]:
        first, skip = cursor or (0, 0)
        self.skipped, self._bytes_before = 0, sum(size for _, size, _ in self._stamps[:first])
        has_text, mark_shown, divided = cursor is not None, False, cursor is not None
        for number in range(first, len(self.paths)):
            reader = self._reader = self._read(self.paths[number])
            skipped = self.skipped
            try:
                for row, pieces in reader.documents(skip if number == first else 0):
                    self.skipped, has_text = skipped + reader.skipped, True
                    yield [number, row], pieces
                    if reader.marked and not mark_shown:
                        say(f"sink-prepare: {reader.mark_notice()}")
                        mark_shown = True
            except NoText:
                pass
            divided = divided or reader.divided
            self.skipped = skipped + reader.skipped
            self._bytes_before += reader.size
            self._reader = None
        if self.separator is not None and not divided:
            say(f"sink-prepare: the separator {self.separator!r} occurs in no .txt file: each is one document")
        if not has_text:
            many = f"its {len(self.paths):,} files, {self.paths[0]} first, hold" if self.paths[1:] else ""
            raise NoText(f"{self.option} has no text: {many or f'{self.paths[0]} holds'} none; give other files")

    def strands(self) -> list[Generator[Document]]:
        def strand(path: Path) -> Generator[Document]:
            with contextlib.suppress(NoText):
                yield from self._read(path).documents()

        return [strand(path) for path in self.paths]

    def fraction(self) -> float | None:
        here = self._reader.fraction() * self._reader.size if self._reader else 0
        return (self._bytes_before + here) / self.size if self.size else 1.0

    def _read(self, path: Path) -> DocumentReader:
        return DocumentReader(path, self.text_key, self.separator)


def _find(name: str, text_key: str, option: str) -> Found:
    try:
        found = find_text_files(name, text_key)
    except UserError:
        refuse_as_text(name, option)
        raise
    if not any(kind_of(path)[0] for path in found.files):
        refuse_as_text(name, option)
    if index := next((path for path in found.left_out if path.suffix == ".idx"), None):
        what = f"{name} holds both text (as {found.files[0].name}) and Megatron data; for the text, name its files;"
        raise megatron_error(f"{what} for the data," if option == "input" else what, index, option)
    return found
