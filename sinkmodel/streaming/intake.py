"""Convert the input of a stream's row (text, ids, or an iterator of either) into blocks of checked token ids."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from sinkmodel.errors import UserError
from sinkmodel.streaming.text_codec import TextEncoder
from sinkmodel.tokenizer import check_rows

BLOCK = 256  # most tokens of a row in one forward


class Intake:
    """The intake of one row. Interrupted text stays in the encoder and continues with the next piece."""

    def __init__(self, tokenizer: Any, vocabulary: int):
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        self.encoder = TextEncoder(tokenizer)

    def blocks(self, source: Any) -> Iterator[list[int]]:
        """Yield blocks of up to BLOCK ids. Ids of a piece of text are yielded at once, since the next may take long.

        Raises UserError for an input that is neither text nor ids of the model. A list is checked completely first.
        """
        if isinstance(source, Tensor):
            source = (source[0] if source.dim() == 2 and len(source) == 1 else source).tolist()
        if isinstance(source, (bytes, bytearray, memoryview)):  # else its bytes would be taken as ids below 256
            raise UserError(f"a stream takes text or ids, not {type(source).__name__}; decode it first")
        if not isinstance(source, Iterable):
            raise UserError(f"a stream takes text, ids, or an iterator of either, not {source!r}")
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
                raise UserError("the stream has no tokenizer, so it takes only ids; make it with a tokenizer for text")
            return item
        if isinstance(item, bool):
            raise UserError(f"a stream takes token ids, not {item}; instead of a mask, feed the ids that it selects")
        try:
            token = operator.index(item)
        except TypeError:
            raise UserError(f"a stream takes text or token ids (whole numbers), not {item!r}") from None
        return self._fitting([token])[0]

    def _fitting(self, ids: list[int]) -> list[int]:
        check_rows(ids, self.vocabulary, self.tokenizer)
        return ids


def rows_of(source: Any, rows: int) -> list[Any]:
    """The input of each row of a batch. Raises UserError if it has another number of rows."""
    if isinstance(source, str) or not isinstance(source, (Sequence, Tensor)) or len(source) != rows:
        size = f"{len(source)} rows" if isinstance(source, (list, tuple, Tensor)) else f"a {type(source).__name__}"
        raise UserError(f"the stream has a batch of {rows} rows and was fed {size}; feed a list of {rows}")
    return list(source)
