"""Read text files as documents: .txt (one document), JSON lines and .parquet (a document per row), compressed or not.

Everything is streamed: a text file by block, JSON lines by line, Parquet by row group. If something cannot be read as
text, a UserError names the file and the place. Only .zst and .parquet files need more than the standard library.
"""

from __future__ import annotations

import codecs
import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.text.content import COMPRESSIONS, Content
from sinkmodel.text.json_lines import Row, first_rows, parse_line, whole_characters
from sinkmodel.text.parquet import read_parquet
from sinkmodel.text.separated import separated

JSON_LINES = (".jsonl", ".ndjson", ".json")
KINDS = (".txt", *JSON_LINES, ".parquet")
END_OF_TEXT = "<|endoftext|>"  # often separates the documents of a .txt file


class NoText(UserError):
    """A file without any text."""


def read_documents(path: Path, text_key: str = "text") -> Iterator[str]:
    """Yield the documents of a file as whole strings. Documents without text are skipped.

    Raises UserError at once if the file is missing or of another kind. Raises it while reading for bytes that are not
    UTF-8, for broken compression, for a JSON line or Parquet file without `text_key`, and (as NoText) for a file
    without any text.
    """
    reader = DocumentReader(path, text_key)
    return _announced(reader)


def _announced(reader: DocumentReader) -> Iterator[str]:
    announced = False
    for _, pieces in reader.documents():
        text = "".join(pieces)
        if reader.marked and not announced:
            say(reader.mark_notice())
            announced = True
        yield text


def lost_link(path: Path) -> UserError:
    """The error for a broken link, such as DVC and git-annex leave behind."""
    return UserError(f"{path} is a link to {path.readlink()}, which is missing; fetch that file, or remove the link")


def kind_of(path: Path) -> tuple[str | None, str]:
    """A file's kind, one of KINDS, and the suffix of its compression or ""; the kind is None if it is not text.

    The given name counts first, since the target of a link often has a name without a suffix (the Hub's cache, DVC).
    The target's name counts if the given one has no known suffix.
    """
    for name in dict.fromkeys((path, path.resolve())):
        suffix, compression = name.suffix.lower(), ""
        if suffix in COMPRESSIONS:
            suffix, compression = name.with_suffix("").suffix.lower(), suffix
        if suffix in KINDS and not (suffix == ".parquet" and compression):  # Parquet compresses its own columns
            return suffix, compression
    return None, ""


class DocumentReader:
    """A file that is read from beginning to end; `fraction()` returns how much of it has been read.

    Args:
        text_key: the key or column that holds the text.
        separator: text that ends a document inside a .txt file; None for one document per file.

    Attributes:
        skipped: number of rows without text so far: null, empty or blank.
        marked: whether `<|endoftext|>` has occurred so far in a .txt file that is read as one document.
        divided: whether the separator has occurred.
    """

    def __init__(self, path: Path, text_key: str = "text", separator: str | None = None):
        if path.is_symlink() and not path.exists():
            raise lost_link(path)
        if not path.exists():
            raise UserError(f"{path} does not exist; check the name")
        kind, compression = kind_of(path)
        if path.is_dir() or kind is None:
            raise UserError(
                f"{path} is not a text file; give {', '.join(KINDS)}, all but .parquet also as .gz, .zst or .xz"
            )
        self.path, self.text_key, self.kind, self.separator = path, text_key, kind, separator
        self.skipped, self.marked, self.divided = 0, False, False
        self._content = Content(path, compression)
        self._rows_read = 0.0

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self._content.size

    def documents(self, skip: int = 0) -> Iterator[tuple[int, Iterable[str]]]:
        """Yield (row number, pieces of the text in order) for each document with text, from row `skip` on.

        The length of the pieces is arbitrary. If the pieces are read before the next document is requested, a document
        may be longer than memory. Raises NoText at the end if there was no document.
        """
        read = {".txt": self._text, ".parquet": self._parquet}.get(self.kind, self._json_lines)
        found = False
        for found_row in read(skip) if self.size else ():
            found = True
            yield found_row
        if not found and not skip:
            raise NoText(f"{self.path} {'holds no text' if self.size else 'is empty'}; give a file with text")

    def fraction(self) -> float:
        """Share of the file that has been read, 0 to 1."""
        return self._rows_read if self.kind == ".parquet" else self._content.fraction()

    def check_key(self) -> None:
        """Raise UserError if the first row of a .json file lacks the key, since such files often are not text."""
        rows = first_rows(self.path, self._content.compression) if self.kind == ".json" else None
        if rows and self.text_key not in rows[0]:
            there = ", ".join(list(rows[0])[:8])
            raise UserError(
                f"{self.path}: no text under the key '{self.text_key}' (there is {there}); {self._remedy()}; if it is "
                "not text, name the other files"
            )

    def mark_notice(self) -> str:
        """A message about a .txt file that seems to hold several documents."""
        return (
            f"{self.path} is read as one document, and the {END_OF_TEXT} in it as ordinary text; to end a document at "
            f"each, prepare it with: sink-prepare --separator '{END_OF_TEXT}'"
        )

    def _text(self, skip: int) -> Iterator[tuple[int, Iterable[str]]]:
        documents = [self._watched()] if self.separator is None else separated(self._decoded(), self.separator)
        for row, pieces in enumerate(documents):
            self.divided = row > 0
            if row < skip:
                continue
            first = next((piece for piece in pieces if piece.strip()), None)
            if first is not None:
                yield row, itertools.chain((first,), pieces)
            elif self.separator is None:  # there is no document between adjacent separators
                self.skipped += 1

    def _watched(self) -> Iterator[str]:
        """Yield the whole text, and record whether it contains END_OF_TEXT."""
        end = ""
        for piece in self._decoded():
            seen = end + piece
            self.marked = self.marked or END_OF_TEXT in seen
            end = seen[1 - len(END_OF_TEXT) :]
            yield piece

    def _decoded(self) -> Iterator[str]:
        """The file as text with line ends \\n, as in Python's text mode."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        newlines = io.IncrementalNewlineDecoder(None, translate=True)
        place = 0  # byte offset of the block in the uncompressed text
        for block in self._content.blocks():
            place = place or self._content.mark
            text = self._decode(decoder, block, place)
            place += len(block)
            if text:
                yield newlines.decode(text)
        rest = newlines.decode(self._decode(decoder, b"", place), final=True)
        if rest:
            yield rest

    def _decode(self, decoder: codecs.IncrementalDecoder, block: bytes, place: int) -> str:
        pending = decoder.getstate()[0]
        try:
            return decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            where = f"at byte {place - len(pending) + error.start}"
            raise self._content.not_utf8(where, error.reason, pending + block, place - len(pending)) from None

    def _json_lines(self, skip: int) -> Iterator[tuple[int, Iterable[str]]]:
        for row, line in enumerate(self._content.lines()):
            if row < skip or not line.strip():
                continue
            text = self._text_of(parse_line(self._content, row + 1, line), f"{self.path}:{row + 1}")
            if text and text.strip():
                yield row, (whole_characters(text) if b"\\u" in line else text,)
            else:
                self.skipped += 1

    def _text_of(self, row: Row, where: str) -> str | None:
        if self.text_key not in row:
            there = ", ".join(list(row)[:8])
            shown = f" (there is {there})" if there else ""
            raise UserError(f"{where}: no text under the key '{self.text_key}'{shown}; {self._remedy()}")
        text = row[self.text_key]
        if text is not None and not isinstance(text, str):
            kind = {bool: "a truth value", list: "a list", dict: "an object"}.get(type(text), "a number")
            raise UserError(
                f"{where}: the key '{self.text_key}' holds {kind}, not text; change it, or give sink-prepare the key "
                "of the text as --text-key"
            )
        return text

    def _parquet(self, skip: int) -> Iterator[tuple[int, Iterable[str]]]:
        for row, text, share in read_parquet(self.path, self.text_key, self._remedy(), skip):
            self._rows_read = share
            if text and text.strip():
                yield row, (text,)
            else:
                self.skipped += 1
        self._rows_read = 1.0

    def _remedy(self) -> str:
        return f"rename the text to '{self.text_key}', or give sink-prepare its name as --text-key"
