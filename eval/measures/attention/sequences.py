"""Sequences of one length out of texts: pieces that follow each other, taken in turns, so that the draw has no dice.

Of each document the first T text tokens are its first piece, the next T its second, and what is left over is not used.
Files take turns in giving documents, and documents in giving pieces: first the first piece of each, then the second of
each, until there are enough. A model with S sink tokens reads them and the first T − S tokens of the same pieces, so
that twins read the same text, and T places are T places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sinkmodel.console import say
from sinkmodel.errors import UserError

if TYPE_CHECKING:
    from sinkmodel.loading import LoadedModel

Item = TypeVar("Item")


def read_sequences(
    loaded: LoadedModel, files: Sequence[Path], count: int, length: int
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """For each file what was taken of it, and at most `count` sequences of `length` ids, sinks in front.

    Raises UserError where no document of any file has `length` tokens; says so where there are fewer than `count`.
    """
    from sinkmodel.files import sha256_of
    from sinkmodel.loading import encode
    from sinkmodel.text import read_documents

    def long_enough(file: Path) -> Iterator[tuple[Path, str]]:
        return ((file, text) for text in read_documents(file) if len(encode(loaded, text, length)) == length)

    each = -(-count // len(files))
    while True:  # a file is read to its end or closed before the next: there may be more than a process may open
        of_files = [list(islice(long_enough(file), each)) for file in files]
        if sum(map(len, of_files)) >= count or all(len(found) < each for found in of_files):
            break
        each *= 2
    documents = list(islice(in_turns(of_files), count))
    if not documents:
        names = ", ".join(map(str, files))
        raise UserError(f"no document of {names} has {length} tokens; lower --length or give longer texts")
    taken: list[tuple[Path, list[int]]] = []
    for each in dict.fromkeys((-(-count // len(documents)), count)):  # more of the long ones where others are short
        of_all = [
            [(file, piece) for piece in pieces(encode(loaded, text, each * length), length)] for file, text in documents
        ]
        taken = list(islice(in_turns(of_all), count))
        if len(taken) == count:
            break
    if len(taken) < count:
        say(f"the texts have {len(taken)} sequences of {length} tokens, fewer than --sequences {count}")
    texts = [
        {"file": str(file), "sha256": sha256_of(file), "sequences": sum(of == file for of, _ in taken)}
        for file in dict.fromkeys(files)
    ]
    return texts, [(loaded.sink_ids + piece)[:length] for _, piece in taken]


def pieces(ids: Sequence[int], length: int) -> list[list[int]]:
    """Consecutive pieces of `length` ids; what is left over is not used."""
    return [list(ids[first : first + length]) for first in range(0, len(ids) - length + 1, length)]


def in_turns(sources: Iterable[Iterable[Item]]) -> Iterator[Item]:
    """The first item of each source, then the second of each, and so on; one that has ended is passed over."""
    left = [iter(source) for source in sources]
    while left:
        going = []
        for source in left:
            for item in source:
                yield item
                going.append(source)
                break
        left = going
