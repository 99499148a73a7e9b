"""The user's own text as a haystack: sentences, passages and words.

A text is read as sentences. A sample takes consecutive sentences from its own place in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sinkmodel.console import say
from sinkmodel.results.parts import Text

LONGEST = 400  # most characters of a sentence; longer ones are cut
PASSAGE = 40  # least words of a passage, which ends with a sentence
MOST_CHARACTERS = 1 << 24  # over all files; the rest is not read
END_OF_SENTENCE = re.compile(r"(?<=[.!?…])\s+|(?<=[.!?…][\"'”’)\]])\s+|(?<=[。！？])")
WORD = re.compile(r"[^\W\d_]{4,}")


@dataclass(frozen=True)
class OwnText:
    """Sentences of the user's files, in their order, with single spaces."""

    sentences: Sequence[str]

    def run(self, share: float, count: int) -> list[str]:
        """`count` sentences from the place `share` (0 to 1) on. After the last sentence the first one follows."""
        return run_of(self.sentences, share, count)

    @cached_property
    def passages(self) -> list[str]:
        """The text as passages of whole sentences with at least PASSAGE words."""
        passages: list[str] = []
        words: list[str] = []
        for sentence in self.sentences:
            words += sentence.split()
            if len(words) >= PASSAGE:
                passages.append(" ".join(words))
                words = []
        return passages

    @cached_property
    def words(self) -> list[str]:
        """The distinct words of at least four letters, in lower case, in the order of their first occurrence."""
        return list(dict.fromkeys(word.lower() for sentence in self.sentences for word in WORD.findall(sentence)))


def read_own_text(files: Sequence[Path]) -> tuple[OwnText, list[Text]]:
    """The text of all files, and a record of what was used of each file."""
    from sinkmodel.files import sha256_of
    from sinkmodel.text import read_documents

    sentences: list[str] = []
    texts, left = [], MOST_CHARACTERS
    for file in files:
        first, before = len(sentences), left
        for document in read_documents(file) if left else ():
            sentences += split_sentences(document[:left])
            left = max(0, left - len(document))
            if not left:
                say(f"only the first {MOST_CHARACTERS:,} characters of --text are used")
                break
        texts.append(
            Text(
                file=str(file),
                sha256=sha256_of(file),
                sentences=len(sentences) - first,
                characters=before - left,
            )
        )
    return OwnText(sentences), texts


def split_sentences(text: str) -> Iterator[str]:
    """Sentences with single spaces. Sentences longer than LONGEST are cut, between words if possible."""
    for sentence in END_OF_SENTENCE.split(text):
        rest = " ".join(sentence.split())
        while len(rest) > LONGEST:
            cut = rest.rfind(" ", 0, LONGEST)
            cut = cut if cut > 0 else LONGEST
            yield rest[:cut]
            rest = rest[cut:].lstrip()
        if rest:
            yield rest


def run_of(parts: Sequence[str], share: float, count: int) -> list[str]:
    assert count <= len(parts)
    first = int(share * len(parts))
    return [parts[place % len(parts)] for place in range(first, first + count)]
