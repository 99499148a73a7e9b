"""What a long-context task asks: a context and questions about it; how it is made and scored.

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
        text: from the end of the context up to the answer, without the space before the answer.
        answers: what a generated text is scored against.
        reference: the answer as one text; its nats are measured.
        distractors: wrong answers of the same form, among which the reference has a rank.
        classes: all answers that are possible, for classification.
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
        score: from 0 to 1, of a text and its question.
        is_final: whether no further text can change the score, so that generation may stop.
    """

    name: str
    score: Callable[[str, Question], float]
    is_final: Callable[[str, Question], bool] = lambda text, question: False


def share_contained(text: str, question: Question) -> float:
    """RULER's metric: the share of the answers that a text contains, in upper or lower case."""
    return sum(answer.lower() in text.lower() for answer in question.answers) / len(question.answers)


CONTAINED = Metric("contained", share_contained, lambda text, question: share_contained(text, question) == 1)


@dataclass(frozen=True)
class Setting:
    """What is the same for all samples of a cell.

    Attributes:
        length: tokens of a prompt and the room for its answer.
        distractors: wrong answers of each question.
        text: the user's own text; None if there is none.
        option: that gives the length, for messages.
        questions: about one context, at most; RULER's tasks have one.
    """

    length: int
    distractors: int
    text: OwnText | None = None
    option: str = "--length"
    questions: int = 4


@dataclass(frozen=True)
class Task:
    """A task whose samples are made.

    Attributes:
        room: tokens that a model may generate.
        build: the sample with n units of haystack, drawn from a `Random` that is the same for every n.
        least: the fewest units that make a sample.
        most: how many units there are to draw from; None if they never run out.
        needs_text: whether the user's own text is needed.
    """

    name: str
    room: int
    build: Callable[[Random, int, Setting], Sample]
    least: int = 1
    most: Callable[[Setting], int | None] = lambda setting: None
    needs_text: bool = False
