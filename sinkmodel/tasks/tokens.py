"""Convert a sample into the tokens of a model.

The whole prompt is tokenized at once and then cut after `before + context`. So a question has the same tokens whether
it is inside or outside of the part that a memory compresses. If a tokenizer merges the last characters of the context
with the question, the cut is a token or two earlier. The model's own sink tokens are in front of every prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sinkmodel.loading import encode
from sinkmodel.tasks.samples import Question, Sample

if TYPE_CHECKING:
    from sinkmodel.loading import LoadedModel

FULL_WIDTH = "\u2e80"  # from this character on, scripts put no space between words


@dataclass(frozen=True)
class Asked:
    """A question in tokens.

    Attributes:
        ids: the tokens after the context, up to the answer.
        candidates: the answers to score, the right one first, each of at most `room` tokens.
        alone: the whole prompt without its context, with the model's sinks in front.
        room: number of tokens that may be generated.
    """

    question: Question
    ids: list[int]
    candidates: list[list[int]]
    alone: list[int]
    room: int


@dataclass(frozen=True)
class Reading:
    """A sample in tokens. `context` begins with the model's sinks."""

    context: list[int]
    asked: tuple[Asked, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens of the longest prompt, sinks included."""
        return len(self.context) + max(len(asked.ids) for asked in self.asked)


def in_tokens(loaded: LoadedModel, sample: Sample, room: int) -> Reading:
    """Convert a sample that fits. If the right answer has more than `room` tokens, it gets the room that it needs."""
    return _reading(loaded, sample, room, None)


def in_tokens_cut(loaded: LoadedModel, sample: Sample, room: int, length: int) -> Reading:
    """Convert a sample with one question. If prompt and room exceed `length` tokens, the middle of the prompt is cut.

    As in LongBench, half of the tokens that remain are from the beginning of the prompt and half from its end.
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
    """Tokens of the longest prompt, without sinks, plus the room for its answer, at least the answer's own length."""
    text = sample.before + sample.context
    return max(
        len(encode(loaded, text + question.text))
        + max(room, len(_answer_ids(loaded, question.text, question.reference)))
        for question in sample.questions
    )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix of two token lists."""
    for place, (a, b) in enumerate(zip(one, other)):
        if a != b:
            return place
    return min(len(one), len(other))


def _answer_ids(loaded: LoadedModel, question: str, answer: str) -> list[int]:
    """The tokens that an answer adds to those of its question."""
    spaced = f"{'' if not question or question[-1].isspace() or question[-1] >= FULL_WIDTH else ' '}{answer}"
    before, both = encode(loaded, question), encode(loaded, question + spaced)
    return both[len(before) :] if both[: len(before)] == before else encode(loaded, spaced)
