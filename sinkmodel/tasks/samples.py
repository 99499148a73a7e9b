"""The parts of a long-context task: a context, questions about it, and how it is made and scored.

A prompt is `before + context + question`, and the answer follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sinkmodel.tasks.text import OwnText


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        text: the text from the end of the context up to the answer, without the space before the answer.
        answers: texts against which a generated text is scored.
        reference: the answer as one text, whose loss in nats is measured.
        distractors: wrong answers of the same form, among which the reference is ranked.
        classes: all possible answers, for classification.
    """

    text: str
    answers: tuple[str, ...]
    reference: str
    distractors: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A context with its questions; `before` holds instructions and worked examples."""

    before: str
    context: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Metric:
    """How a generated text is scored.

    Attributes:
        score: a score from 0 to 1, from a text and its question.
        is_final: whether more text can no longer change the score, so that generation may stop.
    """

    name: str
    score: Callable[[str, Question], float]
    is_final: Callable[[str, Question], bool] = lambda text, question: False


def share_contained(text: str, question: Question) -> float:
    """RULER's metric: the share of the answers that a text contains, ignoring case."""
    return sum(answer.lower() in text.lower() for answer in question.answers) / len(question.answers)


CONTAINED = Metric("contained", share_contained, lambda text, question: share_contained(text, question) == 1)


@dataclass(frozen=True)
class Setting:
    """The settings that all samples of a cell share.

    Attributes:
        length: number of tokens of a prompt and the room for its answer together.
        distractors: number of wrong answers of each question.
        text: the user's own text; None if there is none.
        option: the option that sets the length, for messages.
        questions: largest number of questions about one context; RULER's tasks have one.
    """

    length: int
    distractors: int
    text: OwnText | None = None
    option: str = "--length"
    questions: int = 4


@dataclass(frozen=True)
class Task:
    """A task whose samples are generated.

    Attributes:
        room: number of tokens that a model may generate.
        build: makes the sample with n units of haystack from a `Random` that is the same for every n.
        least: the smallest number of units for a sample.
        most: returns how many units there are; None if they never run out.
        needs_text: whether the task needs the user's own text.
    """

    name: str
    room: int
    build: Callable[[Random, int, Setting], Sample]
    least: int = 1
    most: Callable[[Setting], int | None] = lambda setting: None
    needs_text: bool = False
