"""One text as several documents, divided at a separator, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator


def separated(pieces: Iterator[str], separator: str) -> Iterator[Iterator[str]]:
    """The documents between separators, each as an iterator over pieces of its text; what is left of one when the
    next is asked for is passed over. Line breaks beside a separator, and at both ends, belong to no document.
    """
    source = _Divided(pieces, separator.replace("\r\n", "\n").replace("\r", "\n"))  # as line ends in the text
    while not source.ended:
        document = _without_outer_line_breaks(source.document())
        yield document
        for _ in document:
            pass


class _Divided:
    def __init__(self, pieces: Iterator[str], separator: str):
        assert separator
        self.pieces, self.separator = pieces, separator
        self.text, self.at = "", 0  # what is read, and the place up to which it was given
        self.ended = False

    def document(self) -> Iterator[str]:
        """What comes before the next separator."""
        while True:
            found = self.text.find(self.separator, self.at)
            if found >= 0:
                yield self.text[self.at : found]
                self.at = found + len(self.separator)
                return
            safe = max(self.at, len(self.text) - len(self.separator) + 1)  # a separator may begin after it
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
