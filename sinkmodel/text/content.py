"""Read a file's uncompressed bytes, in blocks or lines, and report what is wrong if they are not UTF-8 text.

A compressed file is read to its last byte. Several gzip members, xz streams or zstd frames in one file are one text.
Anything else after them is an error, not the end of the text.
"""

from __future__ import annotations

import codecs
import gzip
import io
import lzma
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sinkmodel.errors import UserError

BLOCK = 1 << 20
UNPACK = {".gz": "gzip -dc", ".zst": "zstd -dc", ".xz": "xz -dc"}
COMPRESSIONS = tuple(UNPACK)
MARKS = {  # byte order mark -> encoding; UTF-32 comes first, since its mark begins like that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
LFS = b"version https://git-lfs"
MAGIC = {  # first bytes of files that often have a wrong name
    b"\x1f\x8b": "is compressed with gzip; rename it to end in .gz",
    b"\xfd7zXZ\0": "is compressed with xz; rename it to end in .xz",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; rename it to end in .zst",
    b"PAR1": "is a Parquet file; rename it to end in .parquet",
    b"BZh": "is compressed with bzip2; unpack it first",
    b"PK\x03\x04": "is a ZIP archive; unpack it first",
    b"%PDF": "is a PDF; extract its text first",
    LFS: "is the pointer of a file that Git LFS has not fetched; run: git lfs pull",
}
CONTROLS = bytes({*range(32)} - set(b"\t\n\v\f\r"))  # these do not occur in text in UTF-8 or Latin-1
WINDOW = 1 << 12  # bytes around a zero byte that are examined


class Content:
    """A file that is read from beginning to end as UTF-8 text.

    Args:
        compression: the suffix of the compression, such as ".gz"; "" for none.
    """

    def __init__(self, path: Path, compression: str):
        self.path, self.compression = path, compression
        self.size = path.stat().st_size
        self.mark = 0  # length of the byte order mark in bytes, once it has been read
        self.beginning = b""  # the first uncompressed bytes, once they have been read
        self._raw: BinaryIO | None = None

    def fraction(self) -> float:
        """Share of the file that has been read, 0 to 1."""
        if self._raw is None:
            return 0.0
        return 1.0 if self._raw.closed or not self.size else self._raw.tell() / self.size

    def blocks(self) -> Iterator[bytes]:
        """Yield the uncompressed bytes, without a UTF-8 byte order mark.

        Raises UserError if the compression is damaged or truncated, and for UTF-16 and UTF-32.
        """
        place = 0
        with self.path.open("rb") as raw:
            self._raw = raw
            try:
                for block in _with_whole_mark(_uncompressed(raw, self.compression)):
                    if why := not_text(block, place, self.path):
                        raise UserError(f"{self.path} {why}")
                    self.beginning = self.beginning or block[:WINDOW]
                    if place == 0 and block.startswith(codecs.BOM_UTF8):
                        self.mark = len(codecs.BOM_UTF8)
                    yield block[self.mark :] if place == 0 else block
                    place += len(block)
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
                raise UserError(f"{self.path} is truncated or damaged ({error}); copy or download it again") from None

    def lines(self) -> Iterator[bytes]:
        """Yield the lines of `blocks` without their line ends. The last one may be empty."""
        begun: list[bytes] = []
        for block in self.blocks():
            first, *more = block.split(b"\n")
            begun.append(first)
            if more:
                yield b"".join(begun)
                yield from more[:-1]
                begun = [more[-1]]
        yield b"".join(begun)

    def not_utf8(self, where: str, reason: str, sample: bytes, place: int | None = None) -> UserError:
        """The error for bytes that cannot be decoded.

        Args:
            where: phrase that gives the place, for the message.
            reason: the decoder's reason.
            sample: the block or line with the bytes.
            place: its offset in the text; None if that is unknown.
        """
        if what := _by_magic(self.beginning):
            return UserError(f"{self.path} {what}")
        advice = f"convert it first: {_iconv(wide, self.path)}" if (wide := wide_encoding(self.beginning)) else ""
        return UserError(f"{self.path} is not UTF-8 {where} ({reason}): {advice or remedy(sample, place, self.path)}")


def open_uncompressed(raw: BinaryIO, compression: str) -> BinaryIO:
    """Wrap an open compressed file as a file of its uncompressed bytes, read to its last byte as in `Content`."""
    return io.BufferedReader(_Uncompressed(raw, _uncompressed(raw, compression)), BLOCK)


class _Uncompressed(io.RawIOBase):
    def __init__(self, raw: BinaryIO, blocks: Iterator[bytes]):
        self.raw, self.blocks, self.rest = raw, blocks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            while not self.rest and (block := next(self.blocks, None)) is not None:
                self.rest = block
        except (EOFError, lzma.LZMAError) as error:
            raise EOFError(f"truncated or damaged: {error}") from None
        taken = min(len(buffer), len(self.rest))
        buffer[:taken], self.rest = self.rest[:taken], self.rest[taken:]
        return taken

    def close(self) -> None:
        self.raw.close()
        super().close()


def _uncompressed(raw: BinaryIO, compression: str) -> Iterator[bytes]:
    if compression == ".gz":
        return _read_blocks(gzip.GzipFile(fileobj=raw))
    if compression == ".xz":
        return _read_xz(raw)
    if compression == ".zst":
        return _read_zstd(raw)
    return _read_blocks(raw)


def not_text(block: bytes, place: int, path: Path | None = None) -> str | None:
    """The reason why a block is not text although it may decode as UTF-8, with a remedy; None if it is text.

    The result is a phrase such as `is a PDF; …`. Much of UTF-16 decodes as UTF-8, with a zero byte at every other
    place. A few zero bytes in a long text are accepted.

    Args:
        place: offset of the block in the text, in bytes.
        path: the file, for a command to copy; None for standard input.
    """
    if place == 0:
        if (what := _by_magic(block)) and (block.startswith(LFS) or not _printable(block[:WINDOW])):
            return what
        for mark, encoding in MARKS.items():
            if block.startswith(mark):
                return f"is not UTF-8: it is {encoding}; convert it first: {_iconv(encoding, path)}"
    zero = block.find(0)
    while zero >= 0:
        start = max(0, zero - WINDOW // 2)
        window = block[start : zero + WINDOW // 2]
        if (zeros := window.count(0)) >= 4 and zeros * 32 > len(window):
            if place == 0 and (wide := wide_encoding(block[:WINDOW])):
                return f"is not UTF-8 at byte 0: it is {wide}; convert it first: {_iconv(wide, path)}"
            if wide_encoding(window, place + start):
                return (
                    f"is not UTF-8 from byte {place + zero - 1} on: UTF-16 follows other text there, which PowerShell"
                    " writes with >>; convert that part separately"
                )
            return (
                f"is not text: it has zero bytes from byte {place + zero} on, like an unfinished download; copy "
                "or download it again"
            )
        zero = block.find(0, zero + WINDOW // 2)
    return None


def remedy(sample: bytes, place: int | None, path: Path | None = None) -> str:
    """The remedy for bytes that cannot be decoded as UTF-8: what they seem to be, and how to convert them."""
    if encoding := wide_encoding(sample, place):
        return f"it is {encoding}; convert it first: {_iconv(encoding, path)}"
    unpack = UNPACK.get(path.suffix.lower()) if path else None
    sound = f"check it with {unpack.split()[0]} -t, since it may be damaged; " if unpack else ""
    if not _printable(sample):
        return f"{sound}it is not text: give another file, or copy or download it again"
    return f"{sound}convert it first; if it is Latin-1, with: {_iconv('latin1', path)}"


def wide_encoding(sample: bytes, place: int | None = 0) -> str | None:
    """`UTF-16LE`, `UTF-16BE`, `UTF-32LE` or `UTF-32BE`, if bytes without a byte order mark seem to be in it; else None.

    In UTF-16 the high byte of each pair has few values (0 for Latin letters) and the low one many, and some bytes are
    control characters. In UTF-32 the two high bytes are 0.

    Args:
        place: offset of the sample in the text, in bytes; None if it may begin inside a character.
    """
    if place is None or _printable(sample):
        return None
    zeros = [sample[(at - place) % 4 :: 4].count(0) * 4 >= 0.9 * len(sample) for at in range(4)]
    if zeros in ([False, False, True, True], [False, True, True, True]):
        return "UTF-32LE"
    if zeros in ([True, True, False, False], [True, True, True, False]):
        return "UTF-32BE"
    even, odd = len(set(sample[place % 2 :: 2])), len(set(sample[(place + 1) % 2 :: 2]))
    if min(even, odd) < (0.9 if len(sample) > 64 else 0.5) * max(even, odd):  # a few bytes may differ by chance
        return "UTF-16BE" if even < odd else "UTF-16LE"
    return None


def _by_magic(beginning: bytes) -> str | None:
    return next((what for magic, what in MAGIC.items() if beginning.startswith(magic)), None)


def _printable(sample: bytes) -> bool:
    """Whether hardly any byte is a control character, as in UTF-8 and Latin-1."""
    return len(sample.translate(None, CONTROLS)) >= 0.98 * len(sample)


def _iconv(encoding: str, path: Path | None) -> str:
    """A shell command that writes a file, uncompressed and in UTF-8, to the current folder."""
    if path is None:
        return f"iconv -f {encoding} -t UTF-8"
    unpack = UNPACK.get(path.suffix.lower())
    target = shlex.quote("utf8-" + (path.stem if unpack else path.name))
    if unpack:
        return f"{unpack} {shlex.quote(str(path))} | iconv -f {encoding} -t UTF-8 > {target}"
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {target}"


def _with_whole_mark(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The same blocks, the first long enough for any byte order mark."""
    first = b""
    for block in blocks:
        first += block
        if len(first) >= 4:
            break
    if first:
        yield first
    yield from blocks


def _read_blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _read_xz(raw: BinaryIO) -> Iterator[bytes]:
    """Read all streams, and the padding that the format allows after each: zeros, a multiple of four bytes.

    lzma.LZMAFile is not used: it takes padding, garbage, and a damaged later stream for the end.
    """
    data = raw.read(BLOCK)
    while data:
        stream = lzma.LZMADecompressor()
        while not stream.eof:
            if stream.needs_input and not data and not (data := raw.read(BLOCK)):
                raise EOFError("the last stream has no end")
            yield stream.decompress(data, BLOCK)
            data = b""
        padding, data = 0, stream.unused_data or raw.read(BLOCK)
        while data and not (rest := data.lstrip(b"\0")):
            padding, data = padding + len(data), raw.read(BLOCK)
        if data:
            padding, data = padding + len(data) - len(rest), rest
        if padding % 4:
            raise lzma.LZMAError("the number of zeros after a stream is not a multiple of four")


def _read_zstd(raw: BinaryIO) -> Iterator[bytes]:
    """Read all frames. zstandard's stream_reader is not used: it takes a truncated frame for a complete one."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # `zstd --long=31` writes these
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
