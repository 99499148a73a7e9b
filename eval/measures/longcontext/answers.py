"""How a memory answers: it reads a context and a question, generates greedily, and scores given answers.

A question is *outside* if the memory compresses at the end of the context. Then each question is read by a fork of the
one compressed context. A question is *inside* if the memory compresses at the end of the question. Then the context is
read again for each question. In this case the forward that reads the prompt predicts the first token of the answer, as
in the papers, so the effect of forgetting begins only at the second token.

Generated and scored tokens do not stay in a memory: each answer uses its own fork.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from eval.measures.streams.answers import rank_of_first
from sinkmodel.errors import not_finite
from sinkmodel.loading import LoadedModel
from sinkmodel.scoring import nll_of
from sinkmodel.tasks.generation import NextToken
from sinkmodel.tasks.samples import Metric
from sinkmodel.tasks.tokens import Asked, Reading

Place = Literal["inside", "outside"]  # whether the question is in the compressed prompt
PLACES: tuple[Place, ...] = ("outside", "inside")


@dataclass(frozen=True)
class Answer:
    """How one question was answered.

    Attributes:
        text: the greedy generation.
        score: the value of the metric, from 0 to 1.
        exact: whether greedy choices give the right answer, token by token. Text after it does not matter.
        nll: nats per token of the right answer.
        rank: rank from 1 of the right answer among itself and its distractors, by nats per token; None without
            distractors.
    """

    text: str
    score: float
    exact: bool
    nll: float
    rank: float | None


class Reader:
    """A model that reads contexts with memories and answers questions."""

    def __init__(self, loaded: LoadedModel):
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self._next = NextToken(loaded)

    @torch.inference_mode()
    def ask(self, memory: Any, reading: Reading, place: Place, metric: Metric) -> tuple[list[Answer], int, int]:
        """The answers to all questions of a context, and the most bytes held and kept by the compressed memory.

        Args:
            memory: a memory of `sinkmodel.memories`; it is reset before it reads.
        """
        answers = []
        held = kept = 0
        for asked, state, logits_V in self._states(memory, reading, place):
            held, kept = max(held, memory.bytes_held), max(kept, memory.bytes_kept)
            text = self.generate(state.fork(), logits_V, asked, metric)
            found = [self._given(state, logits_V, ids) for ids in asked.candidates]
            nll_K, exact = torch.stack([nll for nll, _ in found]), found[0][1]
            rank = rank_of_first(nll_K[None]).item() if len(nll_K) > 1 else None
            answers.append(Answer(text, metric.score(text, asked.question), exact, nll_K[0].item(), rank))
        return answers, held, kept

    @torch.inference_mode()
    def nll_alone(self, asked: Asked) -> float:
        """Nats per token of the right answer after the prompt without its context."""
        ids = asked.candidates[0]
        ids_1N = torch.tensor([[*asked.alone, *ids[:-1]]], device=self.model.device)
        logits_NV = self.model(input_ids=ids_1N, use_cache=False).logits[0]
        return self._mean_nll(logits_NV[-len(ids) :], ids).item()

    def generate(self, memory: Any, logits_V: Tensor, asked: Asked, metric: Metric) -> str:
        """The greedy continuation, until `asked.room` tokens are used, the text ends, or the score cannot change."""
        text, ids = "", list[int]()
        while True:
            (token,) = self._next.choose(logits_V[None])
            if token in self._next.ends:
                return text
            ids.append(token)
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if len(ids) == asked.room or metric.is_final(text, asked.question):
                return text
            logits_V = self._feed(memory, [token])[-1]

    # ------------------------------------------------------------------------------------------------ with a memory

    def _states(self, memory: Any, reading: Reading, place: Place) -> Iterator[tuple[Asked, Any, Tensor]]:
        """Yield each question, a memory that has read it, and the logits [V] for the first token of its answer."""
        if place == "outside":
            self._read(memory, reading.context)
        for asked in reading.asked:
            if place == "outside":
                state = memory.fork()
                yield asked, state, self._feed(state, asked.ids)[-1]
            else:
                yield asked, memory, self._read(memory, [*reading.context, *asked.ids])

    def _read(self, memory: Any, ids: Sequence[int]) -> Tensor:
        """Read a new prompt and compress it at its end; returns the logits [V] for the next token."""
        memory.reset()
        memory.expect(len(ids))
        logits_NV = self._feed(memory, ids)
        if not memory.ended:
            memory.end_prompt()
        return logits_NV[-1]

    def _feed(self, memory: Any, ids: Sequence[int], keep: int = 1) -> Tensor:
        """Feed tokens; returns the logits [n, V] after each of the last `keep` tokens."""
        ids_1N = torch.tensor([list(ids)], device=self.model.device)
        output = self.model(input_ids=ids_1N, past_key_values=memory, use_cache=True, logits_to_keep=keep)
        return output.logits[0, -keep:]

    def _given(self, state: Any, logits_V: Tensor, ids: Sequence[int]) -> tuple[Tensor, bool]:
        """Nats per token of an answer under teacher forcing, on a fork; and whether greedy choices would give it."""
        logits_AV = logits_V[None]
        if len(ids) > 1:
            logits_AV = torch.cat([logits_AV, self._feed(state.fork(), ids[:-1], len(ids) - 1)])
        return self._mean_nll(logits_AV, ids), self._next.choose(logits_AV) == list(ids)

    def _mean_nll(self, logits_AV: Tensor, ids: Sequence[int]) -> Tensor:
        nll = nll_of(logits_AV[None], torch.tensor([list(ids)], device=self.model.device)).mean()
        if not bool(torch.isfinite(nll)):
            raise not_finite(self.model)
        return nll
