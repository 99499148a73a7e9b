"""Text files as documents: .txt (a file is one document), .jsonl and .parquet (a row is one), compressed or not.

Everything streams: a text file block by block, JSON lines line by line, Parquet row group by row group. What is not
readable as text is a UserError that names the file and the place. Only the standard library is needed until a .zst or
.parquet file comes.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sinkmodel.errors import UserError

BLOCK = 1 << 20
COMPRESSIONS = (".gz", ".zst", ".xz")
KINDS = (".txt", ".jsonl", ".parquet")


def read_documents(path: Path, text_key: str = "text") -> Iterator[str]:
    """The documents of one file as whole strings; empty ones are left out.

    Raises UserError at once for a file that is missing or of another kind, and while reading for bytes that are not
    UTF-8, broken compression, a JSON line or Parquet file without `text_key`, and a file without any text.
    """
    return ("".join(pieces) for _, pieces in DocumentReader(path, text_key).documents())


def is_text_file(path: Path) -> bool:
    return _kind(path) is not None


def text_files(folder: Path) -> list[Path]:
    """The readable files below a folder, by name. Hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and is_text_file(path) and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )


class DocumentReader:
    """One file, read front to back; `fraction()` says how far."""

    def __init__(self, path: Path, text_key: str = "text"):
        if not path.exists():
            raise UserError(f"{path} does not exist; check the name")
        kind = _kind(path)
        if path.is_dir() or kind is None:
            raise UserError(f"{path} is no text file; take {', '.join(KINDS)}, or .txt and .jsonl as .gz, .zst or .xz")
        self.size = path.stat().st_size
        if self.size == 0:
            raise UserError(f"{path} is empty; give a file with text")
        self.path, self.text_key, self.kind = path, text_key, kind
        self._raw: BinaryIO | None = None
        self._rows_read = 0.0

    def documents(self, skip: int = 0) -> Iterator[tuple[int, Iterable[str]]]:
        """(row number, pieces of the text in order) of each document that has text, from row `skip` on.

        The pieces are as long as the file happens to give them: a document longer than memory is no problem as long as
        they are read before the next document is asked for.
        """
        read = {".txt": self._text, ".jsonl": self._json_lines, ".parquet": self._parquet}[self.kind]
        found = False
        for found_row in read(skip):
            found = True
            yield found_row
        if not found and not skip:
            raise UserError(f"{self.path} holds no text; give a file with text")

    def fraction(self) -> float:
        """Share of the file that has been read, 0 to 1."""
        if self._raw is None:
            return self._rows_read
        return 1.0 if self._raw.closed else self._raw.tell() / self.size

    def _text(self, skip: int) -> Iterator[tuple[int, Iterable[str]]]:
        pieces = self._decoded() if skip == 0 else iter(())
        for first in pieces:
            if first.strip():
                yield 0, _chain(first, pieces)
                return

    def _decoded(self) -> Iterator[str]:
        """The file as text without its byte order mark, line ends as \\n, as Python's text mode gives it."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        newlines = io.IncrementalNewlineDecoder(None, translate=True)
        place = 0  # byte offset, in the uncompressed text, of the block
        for block in self._blocks():
            if place == 0 and block.startswith(codecs.BOM_UTF8):
                block, place = block[3:], 3
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block)
            except UnicodeDecodeError as error:
                raise self._undecodable(f"at byte {place - pending + error.start}", error) from None
            place += len(block)
            if text:
                yield newlines.decode(text)
        pending = len(decoder.getstate()[0])
        try:
            rest = newlines.decode(decoder.decode(b"", final=True), final=True)
        except UnicodeDecodeError as error:
            raise self._undecodable(f"at byte {place - pending}", error) from None
        if rest:
            yield rest

    def _json_lines(self, skip: int) -> Iterator[tuple[int, Iterable[str]]]:
        for row, line in enumerate(self._lines()):
            if row >= skip and line.strip():
                text = self._json_text(line, row + 1)
                if text.strip():
                    yield row, (text,)

    def _json_text(self, line: bytes, line_number: int) -> str:
        where = f"{self.path}:{line_number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if line_number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise self._undecodable(f"in line {line_number}, byte {error.start} of the line", error) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not a JSON object ({error}); .jsonl has one object a line") from None
        text = row.get(self.text_key) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{where}: no text under the key '{self.text_key}'{_others(row)}; {self._remedy()}")
        if b"\\u" in line:  # an escape may be half of a surrogate pair, which is no character: U+FFFD, as decoders do
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    def _parquet(self, skip: int) -> Iterator[tuple[int, Iterable[str]]]:
        import pyarrow
        import pyarrow.parquet

        row = 0
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                if self.text_key not in file.schema_arrow.names:
                    names = dict.fromkeys(file.schema_arrow.names)
                    raise UserError(f"{self.path}: no column '{self.text_key}'{_others(names)}; {self._remedy()}")
                for group in range(file.metadata.num_row_groups):
                    if row + file.metadata.row_group(group).num_rows <= skip:
                        row += file.metadata.row_group(group).num_rows
                        continue
                    for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[self.text_key]):
                        for text in batch.column(0).to_pylist():
                            if row >= skip and not isinstance(text, str):
                                raise UserError(
                                    f"{self.path}: row {row + 1} has no text in the column '{self.text_key}'; mend it"
                                )
                            if row >= skip and text.strip():
                                yield row, (text,)
                            row += 1
                        self._rows_read = row / file.metadata.num_rows
        except pyarrow.ArrowException as error:
            raise UserError(f"{self.path} is not a sound Parquet file ({error}); copy or download it again") from None
        except OSError as error:  # Arrow reports a file cut short so
            if error.errno is not None:
                raise
            raise UserError(f"{self.path} is not a sound Parquet file ({error}); copy or download it again") from None

    def _lines(self) -> Iterator[bytes]:
        begun: list[bytes] = []
        for block in self._blocks():
            first, *more = block.split(b"\n")
            begun.append(first)
            if more:
                yield b"".join(begun)
                yield from more[:-1]
                begun = [more[-1]]
        yield b"".join(begun)

    def _blocks(self) -> Iterator[bytes]:
        """The uncompressed bytes."""
        with self.path.open("rb") as raw, contextlib.ExitStack() as opened:
            self._raw = raw
            compression = self.path.suffix.lower()
            try:
                if compression == ".gz":
                    yield from _read_blocks(opened.enter_context(gzip.GzipFile(fileobj=raw)))
                elif compression == ".xz":
                    yield from _read_blocks(opened.enter_context(lzma.LZMAFile(raw)))
                elif compression == ".zst":
                    yield from _read_zstd(raw)
                else:
                    yield from _read_blocks(raw)
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
                raise UserError(f"{self.path} is cut short or damaged ({error}); copy or download it again") from None

    def _remedy(self) -> str:
        return f"rename the text to '{self.text_key}', or give sink-prepare its name as --text_key"

    def _undecodable(self, where: str, error: UnicodeDecodeError) -> UserError:
        return UserError(
            f"{self.path} is not UTF-8 {where} ({error.reason}); convert it first, as in: "
            f"iconv -f latin1 -t utf-8 {self.path.name}"
        )


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        if suffixes and suffixes[-1] == ".parquet":  # Parquet compresses its own columns
            return None
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _others(row: Any) -> str:
    names = ", ".join(str(name) for name in list(row)[:8]) if isinstance(row, dict) else ""
    return f" (there is {names})" if names else ""


def _read_blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _read_zstd(raw: BinaryIO) -> Iterator[bytes]:
    """Frame after frame. Not zstandard's own stream_reader, which takes a frame that is cut short for its end."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as `zstd --long=31` writes
    frame = decompressor.decompressobj()
    fed = False
    try:
        while block := raw.read(BLOCK):
            while block:
                if frame.eof:
                    frame = decompressor.decompressobj()
                yield frame.decompress(block)
                fed, block = True, frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise EOFError(error) from None
    if fed and not frame.eof:
        raise EOFError("the last frame has no end")
