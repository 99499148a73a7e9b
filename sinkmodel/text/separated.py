"""Split a text into documents at a separator, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator


def separated(pieces: Iterator[str], separator: str) -> Iterator[Iterator[str]]:
    """Yield the documents between separators, each as an iterator over pieces of its text.

    If the next document is requested before the current one was read to its end, its rest is skipped. Line breaks next
    to a separator, and at both ends of the text, belong to no document.
    """
    source = _Divided(pieces, separator.replace("\r\n", "\n").replace("\r", "\n"))  # the text has only \n as line ends
    while not source.ended:
        document = _without_outer_line_breaks(source.document())
        yield document
        for _ in document:
            pass


class _Divided:
    def __init__(self, pieces: Iterator[str], separator: str):
        assert separator
        self.pieces, self.separator = pieces, separator
        self.text, self.at = "", 0  # the text read so far, and the place up to which it was yielded
        self.ended = False

    def document(self) -> Iterator[str]:
        """Yield the text before the next separator."""
        while True:
            found = self.text.find(self.separator, self.at)
            if found >= 0:
                yield self.text[self.at : found]
                self.at = found + len(self.separator)
                return
            safe = max(self.at, len(self.text) - len(self.separator) + 1)  # a separator may begin after this place
            yield self.text[self.at : safe]
            more = next(self.pieces, None)
            self.text, self.at = self.text[safe:] + (more or ""), 0
            if more is None:
                self.ended = True
                yield self.text
                return


def _without_outer_line_breaks(pieces: Iterator[str]) -> Iterator[str]:
    begun, held = False, ""
    for piece in pieces:
        piece = held + piece if begun else piece.lstrip("\n")
        begun = begun or bool(piece)
        kept = piece.rstrip("\n")
        held = piece[len(kept) :]
        if kept:
            yield kept
