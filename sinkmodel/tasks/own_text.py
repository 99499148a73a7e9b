"""Tasks whose answers are in the user's own text.

    passages    passages with numbers in front; a question quotes one, and its number is the answer
    key_value   lines `word: word` of the text's own words; a question gives the first, and the second is the answer
    verbatim    running text; a question quotes some words of it, and the words after them are the answer

Each context has as many questions as the setting demands, or fewer if the text has no more. A text shorter than a
sample is refused, since a haystack that repeats itself is easy to compress.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from sinkmodel.errors import UserError
from sinkmodel.tasks.samples import Question, Sample, Setting, Task
from sinkmodel.tasks.text import OwnText, run_of

QUOTE = 12  # words that a question quotes
CONTINUATION = 6  # words after the quote, which are the answer


def text_of(setting: Setting) -> OwnText:
    assert setting.text is not None, "the command asks for --text if a task needs it"
    return setting.text


# --------------------------------------------------------------------------------------------------------------- tasks


def find_passage(rng: Random, units: int, setting: Setting) -> Sample:
    passages = run_of(text_of(setting).passages, rng.random(), units)
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
        if len(questions) == setting.questions:
            break
    context = "\n\n".join(f"Passage {number}: {passage}" for number, passage in zip(numbers, passages))
    return Sample("Below are passages of a text, each with its number.\n\n", context, _some(questions))


def recall_value(rng: Random, units: int, setting: Setting) -> Sample:
    words = rng.sample(text_of(setting).words, 2 * units)
    pairs = list(zip(words[:units], words[units:]))
    whole = "\n".join(f"{key}: {value}" for key, value in pairs)
    questions = []
    for key, value in rng.sample(pairs, units):
        if whole.count(value) > 1:  # the word is also part of another one
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
        if len(questions) == setting.questions:
            break
    return Sample("Below is a list of pairs of words.\n\n", whole, _some(questions))


def continue_quote(rng: Random, units: int, setting: Setting) -> Sample:
    context = " ".join(run_of(text_of(setting).passages, rng.random(), units))
    words = context.split()
    questions = []
    for _ in range(setting.questions):
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
    """`count` consecutive words that occur once in `whole`, and the next `more` words; None if ten tries fail."""
    for _ in range(10 if len(words) >= count + more else 0):
        start = rng.randrange(len(words) - count - more + 1)
        quote, after = words[start : start + count], words[start + count : start + count + more]
        if whole.count(" ".join(quote)) == 1:
            return " ".join(quote), " ".join(after)
    return None


def _some(questions: list[Question]) -> tuple[Question, ...]:
    if not questions:
        raise UserError("--text has no words that occur only once, so no question can be made; give another text")
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
