"""What a row of a stream is fed, a text, ids, or an iterator of either, as blocks of checked token ids."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from sinkmodel.errors import UserError
from sinkmodel.streaming.incremental import TextEncoder
from sinkmodel.tokenizer import check_rows

BLOCK = 256  # tokens of a row in one forward


class Intake:
    """One row's intake. A text whose feeding was broken off waits in the encoder, and goes on with the next piece."""

    def __init__(self, tokenizer: Any, vocabulary: int):
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.encoder = TextEncoder(tokenizer)

    def blocks(self, source: Any) -> Iterator[list[int]]:
        """Blocks of up to BLOCK ids; those of a piece of text at once, however few, since the next may take long.

        Raises UserError for what is neither text nor ids of the model; of a list before anything in it is given.
        """
        if isinstance(source, Tensor):
            source = (source[0] if source.dim() == 2 and len(source) == 1 else source).tolist()
        if isinstance(source, (bytes, bytearray, memoryview)):  # which would be ids below 256
            raise UserError(f"a stream is fed a text or ids, not {type(source).__name__}; decode it first")
        if not isinstance(source, Iterable):
            raise UserError(f"a stream is fed a text, ids, or an iterator of either, not {source!r}")
        if isinstance(source, str):
            source = [source]
        items: Iterable[str | int] = map(self._checked, source)
        ids: list[int] = []
        for item in list(items) if isinstance(source, Sequence) else items:
            if isinstance(item, str):
                ids += self._fitting(self.encoder.push(item))
            else:
                ids += [*self._fitting(self.encoder.flush()), item]
            while len(ids) >= BLOCK or (ids and isinstance(item, str)):
                yield ids[:BLOCK]
                ids = ids[BLOCK:]
        ids += self._fitting(self.encoder.flush())
        for start in range(0, len(ids), BLOCK):
            yield ids[start : start + BLOCK]

    def _checked(self, item: Any) -> str | int:
        if isinstance(item, str):
            if self.tokenizer is None:
                raise UserError("the stream has no tokenizer, so it is fed ids; make it with a tokenizer for text")
            return item
        if isinstance(item, bool):
            raise UserError(f"a stream is fed token ids, not {item}; of a mask feed the ids that it selects")
        try:
            token = operator.index(item)
        except TypeError:
            raise UserError(f"a stream is fed texts or whole numbers, the token ids, not {item!r}") from None
        return self._fitting([token])[0]

    def _fitting(self, ids: list[int]) -> list[int]:
        check_rows(ids, self.vocabulary, self.tokenizer)
        return ids


def rows_of(source: Any, rows: int) -> list[Any]:
    """What each row of a batch is fed. Raises UserError where that is for another number of rows."""
    if isinstance(source, str) or not isinstance(source, (Sequence, Tensor)) or len(source) != rows:
        size = f"{len(source)} rows" if isinstance(source, (list, tuple, Tensor)) else f"a {type(source).__name__}"
        raise UserError(f"the stream has a batch of {rows} rows and was fed {size}; feed a list of {rows}")
    return list(source)
