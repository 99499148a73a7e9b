"""Sliding window with re-computation: there is no cache; the last C tokens are read again for every query.

This is StreamingLLM's Figure 1 (c), and the quality that streaming is compared to. Tokens that have left the window
leave no trace, not even in the hidden states of the tokens inside. If the model has sink tokens, they come first in
every window, as in training; they count towards C.

With a stride s > 1 a window scores its last s queries, which see C − s + 1 to C keys. This is s times faster, but it is
a different function, so result rows include the stride.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eval.policies.policy import Policy, Stream, refuse_narrower_window
from sinkmodel.errors import not_finite
from sinkmodel.products import fast_products
from sinkmodel.results.parts import PolicyFields
from sinkmodel.scoring import check_decoder, nll_of

TOKENS_AT_ONCE = 8192  # tokens of all windows in one forward


@dataclass(frozen=True)
class Recompute(Policy):
    sinks: int
    budget: int
    stride: int = 1
    name = "recompute"
    needs = "nothing"
    positions = "window"

    @property
    def keeps(self) -> str:
        front = f"the first {self.sinks} and " if self.sinks else ""
        return f"no key: {front}the last {self.window} tokens are read again"

    @property
    def label(self) -> str:
        return super().label if self.stride == 1 else f"{super().label}, stride {self.stride}"

    def row(self, longest: int) -> PolicyFields:
        """Adds the stride, and the fewest keys that a query sees once tokens have left the window."""
        most = self.keys_seen(longest)
        least = min(most, self.budget - self.stride + 1)
        return replace(super().row(longest), stride=self.stride, keys_seen_least=least)

    def score(
        self, model: Any, documents: Sequence[Sequence[int]], chunk: int, on_chunk: Callable[[int], None]
    ) -> list[Tensor]:
        refuse_narrower_window(model, self.budget)
        return recompute_nll(model, documents, self.budget, self.sinks, self.stride, chunk, on_chunk)

    def stream(self, model: Any) -> Stream:
        refuse_narrower_window(model, self.budget)
        check_decoder(model, cached=False)
        return RecomputedStream(model, self.budget, self.sinks)


@torch.inference_mode()
def recompute_nll(
    model: Any,
    documents: Sequence[Sequence[int]],
    budget: int,
    sinks: int,
    stride: int,
    chunk: int,
    on_chunk: Callable[[int], None],
) -> list[Tensor]:
    """−log p of every next token, fp32 [T − 1] for each document, computed in recomputed windows.

    Queries p < C see the whole document so far, so one causal forward scores `chunk` of them. After that, windows of
    all documents go through the model in batches, and logits are computed only for the queries that a window scores:
    [windows, stride, V].
    """
    assert 1 <= stride <= budget - sinks
    nll = [torch.empty(max(0, len(ids) - 1)) for ids in documents]
    check_decoder(model, cached=False)
    for ids, all_of_it in zip(documents, nll):
        ids_1T = torch.as_tensor(ids[: budget + 1], dtype=torch.long, device=model.device)[None]
        for first in range(0, min(budget, len(ids) - 1), chunk):
            end = min(first + chunk, budget, len(ids) - 1)
            logits_1NV = last_logits(model, ids_1T[:, :end], end - first)
            all_of_it[first:end] = nll_of(logits_1NV, ids_1T[:, first + 1 : end + 1])[0].cpu()
            on_chunk(end - first)
    jobs = [  # document, its queries first … end − 1
        (document, first, min(first + stride, len(ids) - 1))
        for document, ids in enumerate(documents)
        for first in range(budget, len(ids) - 1, stride)
    ]
    rows = max(1, min(chunk // stride, TOKENS_AT_ONCE // budget))
    for start in range(0, len(jobs), rows):
        batch = jobs[start : start + rows]
        windows_BC = torch.tensor([_window(documents[i], end, budget, sinks) for i, _, end in batch])
        most = max(end - first for _, first, end in batch)
        targets_BN = torch.tensor([list(documents[i][end - most + 1 : end + 1]) for i, _, end in batch])
        nll_BN = nll_of(last_logits(model, windows_BC.to(model.device), most), targets_BN.to(model.device)).cpu()
        for row, (document, first, end) in enumerate(batch):
            nll[document][first:end] = nll_BN[row, most - (end - first) :]
        on_chunk(sum(end - first for _, first, end in batch))
    if not all(bool(torch.isfinite(x).all()) for x in nll):
        raise not_finite(model)
    return nll


def _window(ids: Sequence[int], end: int, budget: int, sinks: int) -> list[int]:
    """The C ids that the query at `end` − 1 sees: the sinks in front of the document, and the latest ids."""
    return [*ids[:sinks], *ids[end - (budget - sinks) : end]]


def last_logits(model: Any, ids_BT: Tensor, count: int) -> Tensor:
    """Logits [B, count, V] of the last positions of a forward without a cache; others are not computed if possible."""
    with fast_products():
        return model(input_ids=ids_BT, use_cache=False, logits_to_keep=count).logits[:, -count:]


class RecomputedStream(Stream):
    """Keeps only token ids, and reads them again at every `feed`."""

    def __init__(self, model: Any, budget: int, sinks: int):
        self.model, self.budget, self.sinks = model, budget, sinks
        self.ids_BT: Tensor | None = None

    @torch.inference_mode()
    def feed(self, ids_BN: Tensor) -> Tensor:
        ids_BT = ids_BN if self.ids_BT is None else torch.cat([self.ids_BT, ids_BN], dim=1)
        if ids_BT.shape[1] > self.budget:
            ids_BT = torch.cat([ids_BT[:, : self.sinks], ids_BT[:, self.sinks - self.budget :]], dim=1)
        self.ids_BT = ids_BT
        return last_logits(self.model, ids_BT, 1)[:, -1]

    def feed_all(self, ids_BN: Tensor) -> Tensor:
        return torch.stack([self.feed(ids_B1) for ids_B1 in ids_BN.split(1, dim=1)], dim=1)

    def fork(self) -> RecomputedStream:
        return copy.copy(self)  # a shallow copy is enough: `feed` replaces ids_BT and never modifies it
