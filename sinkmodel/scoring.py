"""Streaming perplexity without a token-by-token loop: the same numbers from a banded forward in chunks.

    streaming_nll(model, documents, budget=256, sinks=1)    # S sinks and the C − S latest tokens (design, decision 7)
    dense_nll(model, documents)                             # every key so far, at its true position

`sinkmodel.band` has the mathematics, and what it takes of a model; here documents become chunks, and logits losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from sinkmodel.band import Band, banded
from sinkmodel.errors import UserError, not_finite

CHUNK = 256
ROWS_AT_ONCE = 1024  # queries of all documents together in one forward; its logits take ROWS_AT_ONCE × V

OnChunk = Callable[[int], None]  # told how many tokens were scored since the last call


def streaming_nll(
    model: Any,
    documents: Sequence[Sequence[int]],
    budget: int,
    sinks: int,
    chunk: int = CHUNK,
    on_chunk: OnChunk | None = None,
) -> list[Tensor]:
    """What a streaming cache of `budget` keys, the first `sinks` of them kept for good, costs on each document.

    Each document is a list of token ids, sinks included, and is a stream of its own; the result has, for a document of
    T ids, T − 1 numbers in fp32 on the CPU: −log p(token p + 1 | what query p sees), in nats. Memory does not grow
    with T. Raises UserError where budget ≤ sinks, or where the model cannot be streamed this way.
    """
    if budget < sinks + 1 or sinks < 0:
        raise UserError(
            f"a budget of {budget} does not hold {sinks} sinks and the current token; make it at least {sinks + 1}"
        )
    with banded(model) as rotary:
        if rotary.limit is not None:  # positions stay below it
            if budget > rotary.limit:
                raise UserError(
                    f"model type {model.config.model_type!r} has positions of one kind only up to {rotary.limit}; "
                    f"choose a budget of at most {rotary.limit}"
                )
            chunk = max(1, min(chunk, rotary.limit - (budget - sinks)))
        return _score(model, documents, chunk, lambda: Band(model, rotary, budget, sinks, chunk), on_chunk)


def dense_nll(
    model: Any, documents: Sequence[Sequence[int]], chunk: int = CHUNK, on_chunk: OnChunk | None = None
) -> list[Tensor]:
    """The same for a cache that forgets nothing: the model's own attention, causal over everything so far."""
    return _score(model, documents, chunk, Everything, on_chunk)


@torch.inference_mode()
def _score(
    model: Any,
    documents: Sequence[Sequence[int]],
    chunk: int,
    new_memory: Callable[[], Band | Everything],
    on_chunk: OnChunk | None,
) -> list[Tensor]:
    """Batches of right-padded documents of about equal length; padding is computed here and there, never scored."""
    nll: list[Tensor] = [torch.empty(0)] * len(documents)
    longest_first = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
    rows = max(1, ROWS_AT_ONCE // chunk)
    for first in range(0, len(documents), rows):
        batch = longest_first[first : first + rows]
        lengths = [len(documents[i]) for i in batch]
        ids_BT = torch.zeros(len(batch), max(lengths), dtype=torch.long)
        for row, i in enumerate(batch):
            ids_BT[row, : lengths[row]] = torch.as_tensor(documents[i], dtype=torch.long)
            nll[i] = torch.empty(max(0, lengths[row] - 1))
        memory = new_memory()
        for start in range(0, lengths[0] - 1, chunk):
            end = min(start + chunk, lengths[0] - 1)
            alive = sum(length - 1 > start for length in lengths)  # a prefix of the batch: the longest come first
            memory.keep_rows(alive)
            ids_BN = ids_BT[:alive, start:end].to(model.device)
            targets_BN = ids_BT[:alive, start + 1 : end + 1].to(model.device)
            nll_BN = nll_of(memory.forward(model, ids_BN), targets_BN).cpu()
            for row in range(alive):
                stop = min(end, lengths[row] - 1)
                nll[batch[row]][start:stop] = nll_BN[row, : stop - start]
                if on_chunk is not None:
                    on_chunk(stop - start)
    if not all(bool(torch.isfinite(x).all()) for x in nll):
        raise not_finite(model)
    return nll


def nll_of(logits_BNV: Tensor, targets_BN: Tensor) -> Tensor:
    """Cross-entropy in fp32, [B, N]; one document at a time, so that the softmax is never held for all of them."""
    return torch.stack([F.cross_entropy(x.float(), y, reduction="none") for x, y in zip(logits_BNV, targets_BN)])


class Everything:
    """The dense memory: transformers' own growing cache and the model's own attention."""

    def __init__(self) -> None:
        self.cache = DynamicCache()

    def keep_rows(self, rows: int) -> None:
        for layer in self.cache.layers:
            if layer.keys is not None and rows < layer.keys.shape[0]:
                layer.keys, layer.values = layer.keys[:rows], layer.values[:rows]

    def forward(self, model: Any, ids_BN: Tensor) -> Tensor:
        return model(input_ids=ids_BN, past_key_values=self.cache, use_cache=True).logits
