"""Text to tokens and tokens to text piece by piece: the same as for the whole text, which neither side ever holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

BORDER = re.compile(r"(?<=\S)(?= \S)")  # before a lone space all tokenizers split by themselves
LONGEST_WORD = 1 << 12  # characters without a border that are waited for; then a line end will do, or the middle
CONTEXT = 64  # characters of the text before that are encoded along
REPLACEMENT = "\ufffd"  # what decoders give for bytes that are no character, or not yet one
UNFINISHED = 3  # bytes, and so replacement characters, that the beginning of a character may have
LONGEST_BROKEN = 64  # tokens without a whole character after which the bytes are taken as broken


class TextEncoder:
    """Pieces of a text to the token ids of the whole text, as the pieces come.

    What has no border behind it yet waits in `pending`. The words before a border are encoded along, so that tokenizers
    which begin every text with a space put none in the middle. Text that spells a special token stays text.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.pending = self.context = ""

    def push(self, piece: str) -> list[int]:
        """The ids that are certain now."""
        begin = max(0, len(self.pending) - 2)
        self.pending += piece
        cut = max((border.start() for border in BORDER.finditer(self.pending, begin)), default=0)
        if not cut and len(self.pending) > LONGEST_WORD:
            cut = self.pending.rfind("\n") + 1 or len(self.pending) // 2
        return self._take(cut)

    def flush(self) -> list[int]:
        """The rest: the text ends here, and what is pushed next is another text."""
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
        """The ids of a text of its own."""
        if not text:
            return []
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids


class TextDecoder:
    """Token ids to the text that they add, as they come.

    A character whose bytes are spread over tokens is given when it is whole. The tokens before are decoded along, since
    many tokenizers strip a space at the beginning; `before` are the last ids of what the text goes on from.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.special = set(tokenizer.all_special_ids)
        self._know([token for token in before if token not in self.special])

    def push(self, token: int) -> str:
        """The text that is certain now; none for special tokens."""
        if token in self.special:
            return ""
        self.new.append(token)
        text = self._text()
        unfinished = len(text) - len(text.rstrip(REPLACEMENT))
        piece = text[self.given : len(text) - min(unfinished, UNFINISHED)]
        self.given += len(piece)
        if not unfinished and not piece:
            self.new.pop()  # it has no text at all, and would be no context
        elif not unfinished:
            self._know(self.new)
        elif len(self.new) > LONGEST_BROKEN:
            piece += self.flush()
        return piece

    def flush(self) -> str:
        """The rest: no more tokens come."""
        rest = self._text()[self.given :]
        self._know([])
        return rest

    def _know(self, ids: list[int]) -> None:
        """The text of these ids has been given, and is context from now on."""
        self.known = ids
        self.new: list[int] = []
        self.known_text = self._decode(ids).rstrip(REPLACEMENT)
        self.given = len(self.known_text)  # characters of the text of all ids, known and new

    def _text(self) -> str:
        text = self._decode(self.known + self.new)
        if not text.startswith(self.known_text):  # a byte that is no character yet may spoil those before it
            text = self.known_text + self._decode(self.new)
        return text

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) if ids else ""


class StopStrings:
    """Holds back the end of a text as long as it may become one of `strings`."""

    def __init__(self, strings: Sequence[str]):
        self.strings = strings
        self.held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that may be given, and whether a string was met; the text before the first one is all there is."""
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
    """The text of one row: whole characters, up to a stop string."""

    def __init__(self, tokenizer: Any, before: Sequence[int], strings: Sequence[str]):
        self.decoder, self.stops = TextDecoder(tokenizer, before), StopStrings(strings)

    def push(self, token: int | None, last: bool) -> tuple[str, bool]:
        """What the next token adds, and whether it completes a stop string; with `last` all that was held back too."""
        piece = "" if token is None else self.decoder.push(token)
        text, met = self.stops.push(piece + (self.decoder.flush() if last else ""))
        return text + (self.stops.flush() if last else ""), met
