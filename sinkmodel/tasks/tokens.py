"""A sample in the tokens of a model.

The whole prompt is tokenized at once and then cut at the end of `before + context`, so that a question has the same
tokens whether it is inside or outside of what a memory compresses. If a tokenizer joins the last characters of the
context with the question, the cut is a token or two earlier. The model's own sink tokens are in front of every prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sinkmodel.loading import encode
from sinkmodel.tasks.samples import Question, Sample

if TYPE_CHECKING:
    from sinkmodel.loading import LoadedModel

FULL_WIDTH = "\u2e80"  # from here on scripts put no space between words


@dataclass(frozen=True)
class Asked:
    """A question in tokens.

    Attributes:
        ids: what follows the context, up to the answer.
        candidates: the answers to score, the right one first, each of at most `room` tokens.
        alone: the whole prompt without its context, the model's sinks in front.
        room: tokens that may be generated.
    """

    question: Question
    ids: list[int]
    candidates: list[list[int]]
    alone: list[int]
    room: int


@dataclass(frozen=True)
class Reading:
    """A sample in tokens; `context` has the model's sinks in front."""

    context: list[int]
    asked: tuple[Asked, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the longest prompt, the sinks counted."""
        return len(self.context) + max(len(asked.ids) for asked in self.asked)


def in_tokens(loaded: LoadedModel, sample: Sample, room: int) -> Reading:
    """A sample that was made to fit. A right answer with more than `room` tokens gets the room that it needs."""
    return _reading(loaded, sample, room, None)


def in_tokens_cut(loaded: LoadedModel, sample: Sample, room: int, length: int) -> Reading:
    """A sample with one question, with the middle of its prompt left out if prompt and room exceed `length` tokens.

    As LongBench does it: half of what a prompt may have is kept from its beginning and half from its end.
    """
    assert len(sample.questions) == 1, "several questions would share one context"
    return _reading(loaded, sample, room, length - room)


def _reading(loaded: LoadedModel, sample: Sample, room: int, limit: int | None) -> Reading:
    text = sample.before + sample.context
    of_context = encode(loaded, text)
    prompts = [encode(loaded, text + question.text) for question in sample.questions]
    cut = min(_common(of_context, prompt) for prompt in prompts)
    left_out = range(0) if limit is None else range(limit // 2, len(prompts[0]) - (limit - limit // 2))
    asked = []
    for question, prompt in zip(sample.questions, prompts):
        candidates = [_answer_ids(loaded, question.text, text) for text in (question.reference, *question.distractors)]
        most = room if limit is not None else max(room, len(candidates[0]))
        asked.append(
            Asked(
                question,
                [token for place, token in enumerate(prompt) if place >= cut and place not in left_out],
                [ids[:most] for ids in candidates],
                [*loaded.sink_ids, *encode(loaded, sample.before + question.text)],
                most,
            )
        )
    context = [token for place, token in enumerate(prompts[0][:cut]) if place not in left_out]
    return Reading([*loaded.sink_ids, *context], tuple(asked))


def prompt_size(loaded: LoadedModel, sample: Sample, room: int) -> int:
    """Tokens of the longest prompt, without sinks, and of the room for its answer, which is at least its own length."""
    text = sample.before + sample.context
    return max(
        len(encode(loaded, text + question.text))
        + max(room, len(_answer_ids(loaded, question.text, question.reference)))
        for question in sample.questions
    )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two texts share."""
    for place, (a, b) in enumerate(zip(one, other)):
        if a != b:
            return place
    return min(len(one), len(other))


def _answer_ids(loaded: LoadedModel, question: str, answer: str) -> list[int]:
    """What an answer adds to the tokens of its question."""
    spaced = f"{'' if not question or question[-1].isspace() or question[-1] >= FULL_WIDTH else ' '}{answer}"
    before, both = encode(loaded, question), encode(loaded, question + spaced)
    return both[len(before) :] if both[: len(before)] == before else encode(loaded, spaced)
