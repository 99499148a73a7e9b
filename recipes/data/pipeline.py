"""Turns documents into token bytes: one process reads, others encode, and results come back in the order of the text.

Long documents are cut into pieces, and pieces are gathered into units of about equal size. So workers are evenly busy,
and memory does not grow with the size of the corpus or a document. The output depends on the text alone, not on the
number of workers.
"""

from __future__ import annotations

import array
import hashlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from recipes.data.workers import SPAWN, end_with_parent, interrupts_held_back
from sinkmodel.errors import UserError
from sinkmodel.text_tokenizer import text_encoder

PIECE = 1 << 15  # characters; encoding is fastest on texts of this size, by a third compared with whole books
UNIT = 1 << 19  # characters that a worker gets at a time
PREFIX = 1 << 12  # characters at the beginning of a document that decide its split
IN_FLIGHT = 4  # units per worker that are being encoded or wait for the writer
NO_SPACE = 1 << 23  # characters; text without a space to cut at is cut here all the same, so that it fits into memory

ARRAY_CODES = {"uint16": "H", "uint32": "I"}


@dataclass(frozen=True)
class Piece:
    split: str
    text: str
    first: bool  # it begins a document
    last: bool  # it ends one


@dataclass(frozen=True)
class Place:
    """Where reading resumes: in corpus number `source`, at the document of `cursor`, after its first `pieces` pieces.

    `skipped` is the number of rows without text before it.
    """

    source: int = 0
    cursor: Any = None
    pieces: int = 0
    skipped: int = 0

    @property
    def file(self) -> tuple[int, Any]:
        """The source, and the file's number if the source has files, whose cursors are [file, row]."""
        return self.source, self.cursor[0] if isinstance(self.cursor, list) else None


@dataclass(frozen=True)
class Unit:
    pieces: list[Piece]
    end: Place


@dataclass(frozen=True)
class Encoded:
    """A unit and, for each of its pieces, the ids as bytes."""

    unit: Unit
    ids: list[bytes]


def cut(chunks: Iterable[str], limit: int = PIECE) -> Iterator[str]:
    """Cut the text of `chunks` into pieces of at most `limit` characters that encode to the same tokens as the whole.

    A piece ends before a single space between two characters that are not blank: a byte-level BPE splits there anyway.
    If there is no such space, the piece is longer. The pieces depend on the text alone, not on how it comes in chunks.
    """
    text, start, ended = "", 0, False
    chunks = iter(chunks)
    while True:
        while not ended and len(text) - start <= limit + 1:
            more = next(chunks, None)
            if more is None:
                ended = True
            else:
                text, start = text[start:] + more, 0
        if len(text) - start <= limit:
            if start < len(text):
                yield text[start:]
            return
        place = _last_cut(text, start + 1, start + limit)
        if place is None:
            place, text, start, ended = _next_cut(text, start, start + limit, chunks, ended)
        yield text[start:place]
        start = place


def _last_cut(text: str, low: int, high: int) -> int | None:
    while (place := text.rfind(" ", low, high)) > 0:
        if not text[place - 1].isspace() and not text[place + 1].isspace():
            return place
        high = place
    return None


def _next_cut(text: str, start: int, place: int, chunks: Iterator[str], ended: bool) -> tuple[int, str, int, bool]:
    """The first cut at or after `place`; reads more text until there is one."""
    while True:
        while (found := text.find(" ", place)) >= 0 and found + 1 < len(text) and found < start + NO_SPACE:
            if not text[found - 1].isspace() and not text[found + 1].isspace():
                return found, text, start, ended
            place = found + 1
        if len(text) - start > NO_SPACE:
            return start + NO_SPACE, text, start, ended
        more = None if ended else next(chunks, None)
        if more is None:
            return len(text), text, start, True
        place, text, start = (found if found >= 0 else len(text)) - start, text[start:] + more, 0


def beginning(chunks: Iterable[str]) -> tuple[str, Iterator[str]]:
    """The beginning of a text (at least PREFIX characters, if it has so many), and an iterator over the whole text."""
    chunks = iter(chunks)
    head = ""
    while len(head) < PREFIX and (more := next(chunks, None)) is not None:
        head += more
    return head, itertools.chain((head,), chunks)


def split_of(text: str, seed: int, validation: float, test: float) -> str:
    """The split of a document by a hash of its first PREFIX characters.

    Equal documents are always in the same split. A document's split does not depend on the tokenizer: the cuts of the
    text depend on it, but the first PREFIX characters do not.
    """
    head = text[:PREFIX].encode("utf-8", "replace")
    digest = hashlib.blake2b(head, digest_size=8, salt=seed.to_bytes(8, "little"))
    chance = int.from_bytes(digest.digest(), "little") / 2**64
    if chance < test:
        return "test"
    return "validation" if chance < test + validation else "train"


def make_units(
    sources: list[tuple[Any, Callable[[str], str]]], place: Place, limit: int = PIECE, size: int = UNIT
) -> Iterator[Unit]:
    """The text of all sources from `place` on.

    Args:
        sources: pairs of a corpus and a function that returns the split of a document, given its beginning.
        place: where to start; `Place()` is the beginning.
        limit: characters of a piece.
        size: characters of a unit.
    """
    gathered: list[Piece] = []
    length, skipped = 0, place.skipped
    for number in range(place.source, len(sources)):
        corpus, choose = sources[number]
        resumed = number == place.source
        skip = place.pieces if resumed else 0
        for cursor, chunks in corpus.documents(place.cursor if resumed else None):
            for index, piece in enumerate(_pieces(chunks, choose, limit)):
                if index < skip:
                    continue
                gathered.append(piece)
                length += len(piece.text)
                if length >= size:
                    yield Unit(gathered, Place(number, cursor, index + 1, skipped + corpus.skipped))
                    gathered, length = [], 0
            skip = 0
        skipped += corpus.skipped
        yield Unit(gathered, Place(number + 1, skipped=skipped))
        gathered, length = [], 0


def _pieces(chunks: Iterable[str], choose: Callable[[str], str], limit: int) -> Iterator[Piece]:
    head, chunks = beginning(chunks)
    texts = cut(chunks, limit)
    text, split, first = next(texts, None), choose(head), True
    while text is not None:
        following = next(texts, None)
        yield Piece(split, text, first, following is None)
        text, first = following, False


def encode_units(units: Iterator[Unit], definition: str, dtype: str, workers: int) -> Generator[Encoded]:
    """Encode units in `workers` processes. Results come in order; at most IN_FLIGHT units per worker are held.

    Raises UserError if a worker was killed from outside.
    """
    stop, ours = SPAWN.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, SPAWN, initializer=_start_worker, initargs=(definition, dtype, stop))
    waiting: deque[tuple[Unit, Future[list[bytes]]]] = deque()
    try:
        for unit in units:
            with interrupts_held_back():  # this may start a worker
                future = pool.submit(_encode, [piece.text for piece in unit.pieces])
            waiting.append((unit, future))
            while waiting and (len(waiting) >= IN_FLIGHT * workers or waiting[0][1].done()):
                done, future = waiting.popleft()
                yield Encoded(done, future.result())
        while waiting:
            done, future = waiting.popleft()
            yield Encoded(done, future.result())
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most likely for lack of memory; "
            "to resume, run the same command again with fewer --workers"
        ) from None
    except BaseException:
        ours.close()  # ends the workers at once: encoding a text without a space may take many seconds
        raise
    finally:
        waiting.clear()
        pool.shutdown(wait=True, cancel_futures=True)


_encoder: Any = None
_code = "H"


def _start_worker(definition: str, dtype: str, stop: Connection) -> None:
    global _encoder, _code
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per worker
    end_with_parent(stop)
    _encoder, _code = text_encoder(definition), ARRAY_CODES[dtype]


def _encode(texts: list[str]) -> list[bytes]:
    return [
        array.array(_code, encoding.ids).tobytes()
        for encoding in _encoder.encode_batch_fast(texts, add_special_tokens=False)
    ]
