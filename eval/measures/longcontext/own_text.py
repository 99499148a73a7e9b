"""The user's own text: as a haystack, and as tasks whose answers are in it.

    passages    passages with numbers in front; a question quotes one, and its number is the answer
    key_value   lines `word: word` of the text's own words; a question gives the first, and the second is the answer
    verbatim    running text; a question quotes some words of it, and those that follow them are the answer

Each context has up to four questions. A text is read as sentences, of which a sample takes a run from a place of its
own; a text that is shorter than a sample is refused, since a haystack that repeats itself is easy to compress.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from eval.measures.longcontext.samples import Question, Sample, Setting, Task
from sinkmodel.console import say
from sinkmodel.errors import UserError

QUESTIONS = 4  # of one context
LONGEST = 400  # characters of a sentence; longer ones are cut
PASSAGE = 40  # words of a passage, or a few more, up to the end of a sentence
QUOTE = 12  # words of a text that a question quotes
CONTINUATION = 6  # words to be given after a quote
MOST_CHARACTERS = 1 << 24  # of all files; what is beyond is not read
END_OF_SENTENCE = re.compile(r"(?<=[.!?…])\s+|(?<=[.!?…][\"'”’)\]])\s+|(?<=[。！？])")
WORD = re.compile(r"[^\W\d_]{4,}")


@dataclass(frozen=True)
class OwnText:
    """Sentences of the user's files, in their order, with single spaces."""

    sentences: Sequence[str]

    def run(self, share: float, count: int) -> list[str]:
        """`count` sentences from a place on; after the last sentence the first one follows."""
        return _run(self.sentences, share, count)

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


def text_of(setting: Setting) -> OwnText:
    assert setting.text is not None, "the command asks for --text if a task needs it"
    return setting.text


def _run(parts: Sequence[str], share: float, count: int) -> list[str]:
    assert count <= len(parts)
    first = int(share * len(parts))
    return [parts[place % len(parts)] for place in range(first, first + count)]


# --------------------------------------------------------------------------------------------------------------- tasks


def find_passage(rng: Random, units: int, setting: Setting) -> Sample:
    passages = _run(text_of(setting).passages, rng.random(), units)
    whole = "\n".join(passages)
    taken = {run[place : place + 4] for run in re.findall(r"\d{4,}", whole) for place in range(len(run) - 3)}
    free = [number for number in map(str, range(1000, 10_000)) if number not in taken]
    if len(free) < units:
        raise UserError("--text has too many numbers to number its passages; leave out passages, or give another text")
    numbers = rng.sample(free, units)
    questions = []
    for place in rng.sample(range(units), units):
        if (quote := _quote(rng, passages[place].split(), whole, QUOTE)) is None:
            continue
        others = [number for number in numbers if number != numbers[place]]
        questions.append(
            Question(
                f"\n\nOne of the passages above has these words: “{quote[0]}”\nWhich passage is it? Answer: Passage",
                (numbers[place],),
                numbers[place],
                tuple(rng.sample(others, min(len(others), setting.distractors))),
            )
        )
        if len(questions) == QUESTIONS:
            break
    context = "\n\n".join(f"Passage {number}: {passage}" for number, passage in zip(numbers, passages))
    return Sample("Below are passages of a text, each with its number.\n\n", context, _some(questions))


def recall_value(rng: Random, units: int, setting: Setting) -> Sample:
    words = rng.sample(text_of(setting).words, 2 * units)
    pairs = list(zip(words[:units], words[units:]))
    whole = "\n".join(f"{key}: {value}" for key, value in pairs)
    questions = []
    for key, value in rng.sample(pairs, units):
        if whole.count(value) > 1:  # it is a part of another word
            continue
        others = [other for _, other in pairs if other != value]
        questions.append(
            Question(
                f"\n\nWhich word belongs to {key} in the list above? Answer: {key}:",
                (value,),
                value,
                tuple(rng.sample(others, min(len(others), setting.distractors))),
            )
        )
        if len(questions) == QUESTIONS:
            break
    return Sample("Below is a list of pairs of words.\n\n", whole, _some(questions))


def continue_quote(rng: Random, units: int, setting: Setting) -> Sample:
    context = " ".join(_run(text_of(setting).passages, rng.random(), units))
    words = context.split()
    questions = []
    for _ in range(QUESTIONS):
        if (quote := _quote(rng, words, context, QUOTE, CONTINUATION)) is None:
            continue
        starts = [rng.randrange(len(words) - CONTINUATION + 1) for _ in range(2 * setting.distractors)]
        others = dict.fromkeys(" ".join(words[start : start + CONTINUATION]) for start in starts)
        others.pop(quote[1], None)
        questions.append(
            Question(
                f"\n\nThe text above has this passage: “{quote[0]}",
                (quote[1],),
                quote[1],
                tuple(list(others)[: setting.distractors]),
            )
        )
    return Sample("", context, _some(questions))


def _quote(rng: Random, words: Sequence[str], whole: str, count: int, more: int = 0) -> tuple[str, str] | None:
    """`count` words in a row that `whole` has only once, and the `more` after them; None if some draws find none."""
    for _ in range(10 if len(words) >= count + more else 0):
        start = rng.randrange(len(words) - count - more + 1)
        quote, after = words[start : start + count], words[start + count : start + count + more]
        if whole.count(" ".join(quote)) == 1:
            return " ".join(quote), " ".join(after)
    return None


def _some(questions: list[Question]) -> tuple[Question, ...]:
    if not questions:
        raise UserError("--text has no words that occur only once, so that nothing can be asked; give another text")
    return tuple(questions)


def _passages(setting: Setting) -> int:
    return min(9000, len(text_of(setting).passages))  # numbers have four digits


TASKS = {
    task.name: task
    for task in (
        Task("passages", 8, find_passage, least=2, most=_passages, needs_text=True),
        Task("key_value", 8, recall_value, least=8, most=lambda s: len(text_of(s).words) // 2, needs_text=True),
        Task("verbatim", 24, continue_quote, most=_passages, needs_text=True),
    )
}
