"""Encode and decode text piece by piece, with the result of the whole text, which is never held in memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

BORDER = re.compile(r"(?<=\S)(?= \S)")  # before a single space, where every tokenizer splits by itself
LONGEST_WORD = 1 << 12  # most characters without a border; beyond, cut at a line end or in the middle
CONTEXT = 64  # characters of the preceding text that are encoded too
REPLACEMENT = "\ufffd"  # what decoders return for bytes that are not a (whole) character
UNFINISHED = 3  # most bytes, and so replacement characters, of an incomplete character
LONGEST_BROKEN = 64  # tokens without a whole character after which the bytes count as invalid


class TextEncoder:
    """Encodes pieces of a text, as they arrive, to the token ids of the whole text.

    Text with no border after it yet waits in `pending`. The words before a border are encoded again as context, so that
    a tokenizer that begins every text with a space adds none in the middle. The spelling of a special token is encoded
    as ordinary text.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.pending = self.context = ""

    def push(self, piece: str) -> list[int]:
        """Add a piece. Returns the ids that can no longer change."""
        begin = max(0, len(self.pending) - 2)
        self.pending += piece
        cut = max((border.start() for border in BORDER.finditer(self.pending, begin)), default=0)
        if not cut and len(self.pending) > LONGEST_WORD:
            cut = self.pending.rfind("\n") + 1 or len(self.pending) // 2
        return self._take(cut)

    def flush(self) -> list[int]:
        """End the text. Returns the remaining ids; the next `push` begins another text."""
        ids = self._take(len(self.pending))
        self.context = ""
        return ids

    def _take(self, cut: int) -> list[int]:
        if not cut:
            return []
        new, self.pending = self.pending[:cut], self.pending[cut:]
        before, ids = self.whole(self.context), self.whole(self.context + new)
        ids = ids[len(before) :] if ids[: len(before)] == before else self.whole(new)
        recent = (self.context + new)[-CONTEXT:]
        first = BORDER.search(recent)
        self.context = recent[first.start() :] if first else ""
        return ids

    def whole(self, text: str) -> list[int]:
        """The ids of a complete text."""
        if not text:
            return []
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids


class TextDecoder:
    """Decodes token ids, as they arrive, to the text that they add.

    If the bytes of a character are spread over several tokens, it is returned once it is complete. Earlier tokens are
    decoded again as context, since many tokenizers strip a space at the beginning.

    Args:
        before: the last ids of the text that is continued; empty if a new text begins.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.special = set(tokenizer.all_special_ids)
        self._know([token for token in before if token not in self.special])

    def push(self, token: int) -> str:
        """Add a token. Returns the text that can no longer change; empty for special tokens."""
        if token in self.special:
            return ""
        self.new.append(token)
        text = self._text()
        unfinished = len(text) - len(text.rstrip(REPLACEMENT))
        piece = text[self.given : len(text) - min(unfinished, UNFINISHED)]
        self.given += len(piece)
        if not unfinished and not piece:
            self.new.pop()  # it has no text, so it is useless as context
        elif not unfinished:
            self._know(self.new)
        elif len(self.new) > LONGEST_BROKEN:
            piece += self.flush()
        return piece

    def flush(self) -> str:
        """End the text. Returns the rest of it."""
        rest = self._text()[self.given :]
        self._know([])
        return rest

    def _know(self, ids: list[int]) -> None:
        """Keep these ids, whose text has been returned, as context."""
        self.known = ids
        self.new: list[int] = []
        self.known_text = self._decode(ids).rstrip(REPLACEMENT)
        self.given = len(self.known_text)  # characters returned so far, of the text of known and new ids

    def _text(self) -> str:
        text = self._decode(self.known + self.new)
        if not text.startswith(self.known_text):  # an incomplete character may change the characters before it
            text = self.known_text + self._decode(self.new)
        return text

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) if ids else ""


class StopStrings:
    """Holds back the end of a text while it may be the beginning of one of `strings`."""

    def __init__(self, strings: Sequence[str]):
        self.strings = strings
        self.held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that may be returned, and whether a stop string was found; the text then ends before it."""
        self.held += piece
        met = [place for string in self.strings if (place := self.held.find(string)) >= 0]
        if met:
            text, self.held = self.held[: min(met)], ""
            return text, True
        keep = max((n for s in self.strings for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text, False

    def flush(self) -> str:
        text, self.held = self.held, ""
        return text


class Writer:
    """The text of one row, in whole characters, up to a stop string."""

    def __init__(self, tokenizer: Any, before: Sequence[int], strings: Sequence[str]):
        self.decoder, self.stops = TextDecoder(tokenizer, before), StopStrings(strings)

    def push(self, token: int | None, last: bool) -> tuple[str, bool]:
        """The text that the token adds, and whether it completes a stop string. `last` also returns held-back text."""
        piece = "" if token is None else self.decoder.push(token)
        text, met = self.stops.push(piece + (self.decoder.flush() if last else ""))
        return text + (self.stops.flush() if last else ""), met
