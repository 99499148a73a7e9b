"""Sequences of one length cut from texts: consecutive pieces, interleaved deterministically (no sampling).

The first T text tokens of a document are its first piece, the next T its second, and so on; a remainder is not used.
Documents are taken from the files in turns. Pieces are taken from the documents in turns: first the first piece of
each, then the second of each, until there are enough. A model with S sink tokens reads these sinks and then the first
T − S tokens of the same pieces, so that twins read the same text and every sequence has T positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.files import sha256_of
from sinkmodel.loading import LoadedModel, encode
from sinkmodel.results.parts import Text
from sinkmodel.text import read_documents

Item = TypeVar("Item")


def read_sequences(
    loaded: LoadedModel, files: Sequence[Path], count: int, length: int
) -> tuple[list[Text], list[list[int]]]:
    """Returns, for each file, a summary of what was used of it; and at most `count` sequences of `length` ids.

    Each sequence begins with the model's sinks. Raises UserError if no document has `length` tokens. If there are fewer
    than `count` sequences, this is reported.
    """

    def long_enough(file: Path) -> Iterator[tuple[Path, str]]:
        return ((file, text) for text in read_documents(file) if len(encode(loaded, text, length)) == length)

    each = -(-count // len(files))
    while True:  # only one file is open at a time: there may be more files than a process may open
        of_files = [list(islice(long_enough(file), each)) for file in files]
        if sum(map(len, of_files)) >= count or all(len(found) < each for found in of_files):
            break
        each *= 2
    documents = list(islice(in_turns(of_files), count))
    if not documents:
        names = ", ".join(map(str, files))
        raise UserError(f"no document of {names} has {length} tokens; lower --length or give longer texts")
    taken: list[tuple[Path, list[int]]] = []
    for each in dict.fromkeys((-(-count // len(documents)), count)):  # if some are short, take more of the long ones
        of_all = [
            [(file, piece) for piece in pieces(encode(loaded, text, each * length), length)] for file, text in documents
        ]
        taken = list(islice(in_turns(of_all), count))
        if len(taken) == count:
            break
    if len(taken) < count:
        say(f"the texts have {len(taken)} sequences of {length} tokens, fewer than --sequences {count}")
    texts = [
        Text(file=str(file), sha256=sha256_of(file), sequences=sum(of == file for of, _ in taken))
        for file in dict.fromkeys(files)
    ]
    return texts, [(loaded.sink_ids + piece)[:length] for _, piece in taken]


def pieces(ids: Sequence[int], length: int) -> list[list[int]]:
    """Consecutive pieces of `length` ids; a remainder is not used."""
    return [list(ids[first : first + length]) for first in range(0, len(ids) - length + 1, length)]


def in_turns(sources: Iterable[Iterable[Item]]) -> Iterator[Item]:
    """The first item of each source, then the second of each, and so on; exhausted sources are skipped."""
    left = [iter(source) for source in sources]
    while left:
        going = []
        for source in left:
            for item in source:
                yield item
                going.append(source)
                break
        left = going
