"""Streaming perplexity without a token-by-token loop: a banded forward in chunks gives the same numbers.

    streaming_nll(model, documents, budget=256, sinks=1)    # S sinks and the C − S latest tokens
    dense_nll(model, documents)                             # every key so far, at its true position

`sinkmodel.band` has the mathematics and the requirements on the model. This file cuts documents into chunks, and turns
logits into losses (DESIGN.md, "Scoring is parallel and exact").
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from sinkmodel.band import Band, banded
from sinkmodel.errors import UserError, first_line, not_finite
from sinkmodel.products import fast_products

CHUNK = 256
ROWS_AT_ONCE = 1024  # most queries of one forward, over all documents; its logits take ROWS_AT_ONCE × V

OnChunk = Callable[[int], None]  # called with the number of tokens scored since the last call


def streaming_nll(
    model: Any,
    documents: Sequence[Sequence[int]],
    budget: int,
    sinks: int,
    chunk: int = CHUNK,
    on_chunk: OnChunk | None = None,
) -> list[Tensor]:
    """The loss of each document with a streaming cache of `budget` keys, of which the first `sinks` are never evicted.

    Args:
        documents: lists of token ids, sinks included. Each document is a stream of its own.
        budget: C, the number of keys that a query sees, its own included.
        sinks: S, the number of leading tokens that are never evicted.
        chunk: number of queries that are computed together; it does not change the result.
        on_chunk: called with the number of tokens scored since its last call.

    Returns for a document of T ids a tensor of T − 1 numbers in fp32 on the CPU: −log p(token p + 1 | what query p
    sees), in nats. Memory does not grow with T.

    Raises UserError if budget ≤ sinks, for ids that the model does not have, for a model in training mode, and for a
    model that cannot be streamed this way.
    """
    _check_input(model, documents, chunk)
    if budget < sinks + 1 or sinks < 0:
        raise UserError(
            f"a budget of {budget} does not hold {sinks} sinks and the current token; make it at least {sinks + 1}"
        )
    with banded(model, budget) as rotary:
        if rotary.limit is not None:  # positions stay below it
            if budget > rotary.limit:
                raise UserError(
                    f"model type {model.config.model_type!r} keeps its rotary frequencies only up to {rotary.limit}; "
                    f"choose a budget of at most {rotary.limit}"
                )
            chunk = max(1, min(chunk, rotary.limit - (budget - sinks)))
        return _score(model, documents, chunk, lambda: Band(model, rotary, budget, sinks, chunk), on_chunk)


def dense_nll(
    model: Any, documents: Sequence[Sequence[int]], chunk: int = CHUNK, on_chunk: OnChunk | None = None
) -> list[Tensor]:
    """As `streaming_nll`, for a cache that evicts nothing: the model's own attention, causal over all tokens so far.

    Raises UserError if the model is not a decoder or has no such cache, and as `streaming_nll`.
    """
    _check_input(model, documents, chunk)
    check_decoder(model, cached=True)
    return _score(model, documents, chunk, Everything, on_chunk)


def _check_input(model: Any, documents: Sequence[Sequence[int]], chunk: int) -> None:
    if chunk < 1:
        raise UserError(f"chunk is {chunk}; it is the number of queries computed together, at least 1")
    if model.training:
        raise UserError("the model is in training mode, with its dropout on; call model.eval() first")
    rows = model.get_input_embeddings().num_embeddings
    for ids_T in map(torch.as_tensor, documents):
        if not len(ids_T):
            continue
        if ids_T.is_floating_point() or ids_T.dtype == torch.bool:
            raise UserError(f"a document has {ids_T.dtype} instead of token ids; give whole numbers")
        low, high = (int(extreme) for extreme in ids_T.aminmax())
        if low < 0 or high >= rows:
            raise UserError(f"a document has the id {low if low < 0 else high}, and the model has ids 0 to {rows - 1}")


@torch.inference_mode()
def _score(
    model: Any,
    documents: Sequence[Sequence[int]],
    chunk: int,
    new_memory: Callable[[], Band | Everything],
    on_chunk: OnChunk | None,
) -> list[Tensor]:
    """Score batches of right-padded documents of similar length. Some padding is computed, but never scored."""
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
            alive = sum(length - 1 > start for length in lengths)  # a prefix of the batch, since the longest come first
            memory.keep_rows(alive)
            ids_BN = ids_BT[:alive, start:end].to(model.device)
            targets_BN = ids_BT[:alive, start + 1 : end + 1].to(model.device)
            with fast_products():
                logits_BNV = memory.forward(model, ids_BN)
            nll_BN = nll_of(logits_BNV, targets_BN).cpu()
            for row in range(alive):
                stop = min(end, lengths[row] - 1)
                nll[batch[row]][start:stop] = nll_BN[row, : stop - start]
                if on_chunk is not None:
                    on_chunk(stop - start)
    if not all(bool(torch.isfinite(x).all()) for x in nll):
        raise not_finite(model)
    return nll


def nll_of(logits_BNV: Tensor, targets_BN: Tensor) -> Tensor:
    """Cross-entropy in fp32, [B, N]; one document at a time, so that memory holds the softmax of only one."""
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


_SOUND: weakref.WeakKeyDictionary[Any, set[bool]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def check_decoder(model: Any, cached: bool) -> None:
    """Raise UserError if a token sees later ones, or (`cached`) if logits change when a text is fed in pieces.

    Encoders can be loaded as language models, but their queries see the answers. A model that keeps a state instead of
    keys accepts transformers' cache without an error, but begins again with every piece. Both are found by trial, once
    for each model.
    """
    if cached in _SOUND.setdefault(model, set()):
        return
    kind, rows = model.config.model_type, model.get_input_embeddings().num_embeddings
    ids_BT = torch.arange(1, 17, device=model.device).view(4, 4) * 7 % rows
    whole_BTV = model(input_ids=ids_BT, use_cache=False).logits
    if _apart(model(input_ids=ids_BT[:, :2], use_cache=False).logits, whole_BTV[:, :2]):
        raise UserError(
            f"model type {kind!r} lets a token see those that follow it, so it does not predict them; "
            "only decoders can be scored"
        )
    why = _why_not_cached(model, ids_BT, whole_BTV) if cached else None
    if why is not None:
        raise UserError(
            f"model type {kind!r} does not continue from transformers' cache of keys and values ({why}); "
            "the only policy that can run it is recompute, which has no cache"
        )
    _SOUND[model].add(cached)


def _why_not_cached(model: Any, ids_BT: Tensor, whole_BTV: Tensor) -> str | None:
    """The problem if a text is fed to a cache in two pieces; None if the logits are those of the whole text."""
    memory = Everything()
    try:
        _, second_BNV = [memory.forward(model, piece_BN) for piece_BN in ids_BT.split(2, dim=1)]
    except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:  # layers that keep a state
        return first_line(error)
    return "it forgets what came before" if _apart(second_BNV, whole_BTV[:, 2:]) else None


def _apart(x_BNV: Tensor, y_BNV: Tensor) -> bool:
    """Whether logits differ, up to a constant, by more than rounding.

    Compares the median over tokens, since rounding may send a few tokens to other experts. In so short a text, what a
    query forgets or foresees changes a large part of its logits.
    """
    tolerance = 0.2 if x_BNV.dtype.itemsize < 4 else 1e-3
    x_BNV, y_BNV = (z.float() - z.float().mean(-1, keepdim=True) for z in (x_BNV, y_BNV))
    difference_BN = (x_BNV - y_BNV).norm(dim=-1) / y_BNV.norm(dim=-1)
    return difference_BN.median().item() > tolerance
