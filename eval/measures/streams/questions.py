"""Questions with choices: read from a .jsonl file or made up, and written as a prompt for a base model.

    {"question": "What colour is the sky?", "choices": ["blue", "green"], "answer": 0}

`answer` is the number of the right choice, from 0, or its text. ARC's own rows are read too: `choices` as
{"text": […], "label": […]}, and `answerKey`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sinkmodel.errors import UserError
from sinkmodel.loading import LoadedModel, encode
from sinkmodel.text.json_lines import Row, read_json_lines

NAMES = "Anna Ben Clara David Emma Frank Grace Henry Julia Kate Leo Mary Nick Peter Rose Sam Tom Will"
COLOURS = "red blue green yellow black white brown pink grey purple orange golden"
THINGS = "ball book box car chair coat cup dog flower hat horse house key kite lamp ship shoe table"
PEOPLE = 4  # people in a made-up question, and so the number of its choices
BETWEEN = "\n\n"  # follows each answer in a stream


@dataclass(frozen=True)
class Question:
    text: str
    choices: list[str]
    answer: int  # index of the right choice


@dataclass(frozen=True)
class Asked:
    """A question in tokens; the choices may differ in length."""

    prompt: list[int]
    choices: list[list[int]]
    characters: list[int]  # length of each choice in characters, by which its log-likelihood is divided
    answer: int

    @property
    def right(self) -> list[int]:
        return self.choices[self.answer]


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The first `limit` questions of a .jsonl file (None: all). Raises UserError that names the first invalid line."""
    questions = [_question(row, f"{path}:{number}") for number, row in islice(read_json_lines(path), limit)]
    if not questions:
        raise UserError(f"{path} holds no question; give one per line, with the keys question, choices and answer")
    return questions


def _question(row: Row, where: str) -> Question:
    for key, others in (("question", ()), ("choices", ()), ("answer", ("answerKey",))):
        if not any(name in row for name in (key, *others)):
            there = ", ".join(map(str, list(row)[:8])) or "nothing"
            raise UserError(f"{where}: no key '{key}' (there is {there}); each line needs question, choices and answer")
    text, choices = row["question"], row["choices"]
    labels: list[Any] = []
    if isinstance(choices, dict):
        labels, choices = choices.get("label") or [], choices.get("text")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: the question has no text; give one")
    if not isinstance(choices, list) or not all(isinstance(x, str) and x.strip() for x in choices):
        raise UserError(f"{where}: the choices are not a list of texts; give at least two, none of them empty")
    if len(choices) < 2:
        raise UserError(f"{where}: {len(choices)} choices; give at least two to choose among")
    if labels and (not isinstance(labels, list) or len(labels) != len(choices)):
        raise UserError(f"{where}: the labels are not a list of {len(choices)}, one for each choice; correct them")
    given = answer = row.get("answer", row.get("answerKey"))
    names = labels if answer in labels else choices
    if answer in names:
        answer = names.index(answer)
    elif not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise UserError(
            f"{where}: the answer {answer!r} is not a choice; give its number, 0 to {len(choices) - 1}, or its text"
        )
    choices = [x.strip() for x in choices]
    if names.count(given) > 1 or choices.count(choices[answer]) > 1:
        raise UserError(f"{where}: the answer {given!r} fits several choices; correct the question or leave it out")
    return Question(text.strip(), choices, answer)


def make_questions(seed: int, count: int) -> list[Question]:
    """Questions that contain their own answer, so that a small base model can do better than chance (one in four).

    "Anna has a red ball, Ben has a black key, … What colour is the key?"
    """
    rng = random.Random(f"questions {seed}")
    questions = []
    for _ in range(count):
        people, things = rng.sample(NAMES.split(), PEOPLE), rng.sample(THINGS.split(), PEOPLE)
        colours, answer = rng.sample(COLOURS.split(), PEOPLE), rng.randrange(PEOPLE)
        facts = [f"{person} has {_a(colour)} {thing}" for person, colour, thing in zip(people, colours, things)]
        text = f"{', '.join(facts[:-1])} and {facts[-1]}. What colour is the {things[answer]} of {people[answer]}?"
        choices = sorted(colours)
        questions.append(Question(text, choices, choices.index(colours[answer])))
    return questions


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def in_tokens(loaded: LoadedModel, question: Question) -> Asked:
    """The question as lm-eval writes ARC: `Question: …`, `Answer:`, and the tokens that each choice adds to these."""
    text = f"Question: {question.text}\nAnswer:"
    prompt = encode(loaded, text)
    choices = [encode(loaded, f"{text} {choice}")[len(prompt) :] for choice in question.choices]
    return Asked(prompt, choices, [len(choice) for choice in question.choices], question.answer)
