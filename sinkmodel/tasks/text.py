"""The user's own text as a haystack: sentences, passages and words.

A text is read as sentences, of which a sample takes a run from a place of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sinkmodel.console import say

LONGEST = 400  # characters of a sentence; longer ones are cut
PASSAGE = 40  # words of a passage, or a few more, up to the end of a sentence
MOST_CHARACTERS = 1 << 24  # of all files; what is beyond is not read
END_OF_SENTENCE = re.compile(r"(?<=[.!?…])\s+|(?<=[.!?…][\"'”’)\]])\s+|(?<=[。！？])")
WORD = re.compile(r"[^\W\d_]{4,}")


@dataclass(frozen=True)
class OwnText:
    """Sentences of the user's files, in their order, with single spaces."""

    sentences: Sequence[str]

    def run(self, share: float, count: int) -> list[str]:
        """`count` sentences from a place on; after the last sentence the first one follows."""
        return run_of(self.sentences, share, count)

    @cached_property
    def passages(self) -> list[str]:
        """Whole sentences, as many as make PASSAGE words."""
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
        """The different words of four letters or more, in lower case, in the order in which they first appear."""
        return list(dict.fromkeys(word.lower() for sentence in self.sentences for word in WORD.findall(sentence)))


def read_own_text(files: Sequence[Path]) -> tuple[OwnText, list[dict[str, Any]]]:
    """The text of all files, and for each file what was taken of it."""
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
            {
                "file": str(file),
                "sha256": sha256_of(file),
                "sentences": len(sentences) - first,
                "characters": before - left,
            }
        )
    return OwnText(sentences), texts


def split_sentences(text: str) -> Iterator[str]:
    """Sentences with single spaces; one longer than LONGEST is cut, between words if it has spaces."""
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
