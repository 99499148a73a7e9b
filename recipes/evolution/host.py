"""The host: a model that reads prompts with many candidates at once, as rows of a batch, and answers questions.

A memory decides for the first time at its `interval`th token. The tokens before it are read once for all candidates.
Then the rows are repeated, each with the parameters of one candidate. Questions are not part of the context: each is
read by a fork of a candidate's memory of the context, and the right answer is scored after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sinkmodel.errors import not_finite
from sinkmodel.memories import make_memory
from sinkmodel.memories.namm import NAMM, NAMMConfig
from sinkmodel.memories.selection import EMPTY
from sinkmodel.scoring import nll_of
from sinkmodel.tasks.generation import NextToken
from sinkmodel.tasks.tokens import Asked, Reading

if TYPE_CHECKING:
    from sinkmodel.loading import LoadedModel
    from sinkmodel.tasks.cells import Cell
    from sinkmodel.tasks.samples import Metric


@dataclass(frozen=True)
class Read:
    """Results of R rows on a prompt: scores, nats per token of the right answers, share of the prompt that was kept."""

    score_R: Tensor
    nll_R: Tensor
    kept_R: Tensor


class Host:
    """A model with the memory that is evolved on it.

    Args:
        namm: config of the memory; None measures only the full cache.
        match: if True, answers are generated and scored by the task's metric, else by the right answer's likelihood.
    """

    def __init__(self, loaded: LoadedModel, namm: NAMMConfig | None, match: bool):
        self.loaded, self.model, self.namm, self.match = loaded, loaded.model, namm, match
        self._next = NextToken(loaded)

    @torch.inference_mode()
    def of_groups(self, cell: Cell, groups: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """For each group of candidates [r, n]: `score` and `kept`, [r, prompts]."""
        parameters = [torch.tensor(group, dtype=torch.float32, device=self.model.device) for group in groups]
        found: list[list[Read]] = [[] for _ in groups]
        for reading in cell.readings if groups else ():
            for place, memory in enumerate(self._memories(reading, parameters)):
                found[place].append(self._ask(memory, reading, cell.metric, len(groups[place])))
        return [
            {
                name: np.stack([getattr(read, f"{name}_R").numpy() for read in reads], axis=1)
                for name in ("score", "kept")
            }
            for reads in found
        ]

    @torch.inference_mode()
    def of_full_cache(self, cell: Cell) -> list[Read]:
        """The results of the full cache on each prompt."""
        found = []
        for reading in cell.readings:
            memory = make_memory("dense", self.model)
            self._feed(memory, reading.context)
            found.append(self._ask(memory, reading, cell.metric, 1))
        return found

    @torch.inference_mode()
    def nll_alone(self, reading: Reading) -> float:
        """Nats per token of the right answers after the prompt without its context, mean over the questions."""
        total = 0.0
        for asked in reading.asked:
            answer = asked.candidates[0]
            ids_1N = torch.tensor([[*asked.alone, *answer[:-1]]], device=self.model.device)
            logits = self.model(input_ids=ids_1N, use_cache=False).logits[:, -len(answer) :]
            total += self._mean_nll(logits, answer).item()
        return total / len(reading.asked)

    # ------------------------------------------------------------------------------------------------------- reading

    def _memories(self, reading: Reading, groups: Sequence[Tensor]) -> Iterator[Any]:
        """For each group, one after the other, a memory that has read the context."""
        assert self.namm is not None
        shared = min(self.namm.interval - 1, len(reading.context))
        start = NAMM(self.model, self.namm)
        self._feed(start, reading.context[:shared])
        for parameters in groups:
            memory = start.for_candidates(parameters)
            if rest := reading.context[shared:]:
                self._feed(memory, rest, len(parameters))
            yield memory

    def _ask(self, memory: Any, reading: Reading, metric: Metric, rows: int) -> Read:
        scores, nlls = [], []
        kept_R = kept_share(memory)
        for asked in reading.asked:
            nll_R = self._nll(memory.fork(), asked, rows)
            nlls.append(nll_R)
            scores.append(self._matches(memory.fork(), asked, metric, rows) if self.match else torch.exp(-nll_R))
        return Read(torch.stack(scores).mean(dim=0), torch.stack(nlls).mean(dim=0), kept_R)

    def _nll(self, state: Any, asked: Asked, rows: int) -> Tensor:
        """Nats per token [R] of the right answer."""
        answer = asked.candidates[0]
        return self._mean_nll(self._feed(state, [*asked.ids, *answer[:-1]], rows, len(answer)), answer)

    def _mean_nll(self, logits_RAV: Tensor, answer: list[int]) -> Tensor:
        targets_RA = torch.tensor([answer] * len(logits_RAV), device=logits_RAV.device)
        nll_R = nll_of(logits_RAV, targets_RA).double().mean(dim=1).cpu()
        if not bool(torch.isfinite(nll_R).all()):
            raise not_finite(self.model)
        return nll_R

    def _matches(self, state: Any, asked: Asked, metric: Metric, rows: int) -> Tensor:
        """The metric [R] of each row's greedily generated answer; stops when no metric can change any more."""
        logits_RV = self._feed(state, asked.ids, rows)[:, -1]
        ids: list[list[int]] = [[] for _ in range(rows)]
        texts, ended = [""] * rows, [False] * rows
        for _ in range(asked.room):
            tokens = self._next.choose(logits_RV)
            for row, token in enumerate(tokens):
                ended[row] = ended[row] or token in self._next.ends
                if not ended[row]:
                    ids[row].append(token)
                    texts[row] = self.loaded.tokenizer.decode(ids[row], skip_special_tokens=True)
                    ended[row] = metric.is_final(texts[row], asked.question)
            if all(ended):
                break
            logits_RV = self._forward(state, torch.tensor(tokens)[:, None])[:, -1]
        return torch.tensor([metric.score(text, asked.question) for text in texts], dtype=torch.float64)

    def _feed(self, memory: Any, ids: Sequence[int], rows: int = 1, keep: int = 1) -> Tensor:
        """Feed the same tokens to all rows; returns the logits [R, keep, V] of the last `keep` tokens."""
        return self._forward(memory, torch.tensor([list(ids)]).expand(rows, -1), keep)

    def _forward(self, memory: Any, ids_RN: Tensor, keep: int = 1) -> Tensor:
        ids_RN = ids_RN.to(self.model.device)
        output = self.model(input_ids=ids_RN, past_key_values=memory, use_cache=True, logits_to_keep=keep)
        return output.logits[:, -keep:]


def kept_share(memory: Any) -> Tensor:
    """The share [R] of the tokens read so far that each row still holds, mean over layers and KV heads."""
    shares = []
    for layer in memory.layers:
        positions = layer.held_positions()
        shares.append((positions != EMPTY).sum(dim=-1).double().mean(dim=-1).cpu())
    return torch.stack(shares).mean(dim=0) / torch.tensor(memory.seen, dtype=torch.float64)


def is_able(full: Sequence[Read], alone: Sequence[float], match: bool) -> tuple[bool, float, float]:
    """Whether the full cache can do a task, its score, and the nats per token that the context gains.

    The thresholds are those of `sink-eval longcontext`, but only the number that fitness uses is compared.
    """
    from sinkmodel.tasks.cells import FLOOR_GAIN, FLOOR_SCORE

    score = math.fsum(read.score_R.item() for read in full) / len(full)
    gain = math.fsum(nll - read.nll_R.item() for read, nll in zip(full, alone)) / len(full)
    return (score >= FLOOR_SCORE if match else gain >= FLOOR_GAIN), score, gain
