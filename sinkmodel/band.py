"""The keys that a chunk of streaming queries sees, and their attention, in an unmodified transformers model.

A stream that holds C = S + W keys, the current token included, numbers them by place in the cache at every step
(StreamingLLM, section 3.2). For query t this means:

    key j in the window, t − W < j ≤ t, j ≥ S     at distance t − j, as in plain RoPE
    sink i < S, i ≤ t                             at distance min(t, C − 1) − i

A cached key does not depend on the time of the query, and hidden states never change once computed, so the queries of a
chunk are computed together. Window keys and sinks keep the rotation that the model gave them. For the sinks the query
is turned instead, from its place in the text to its place in the cache.

The model stays unmodified: a `Cache` holds the keys, and an attention function, registered under its own name, gets
queries and keys after RoPE. Whatever can be checked is checked: a model that does not call that function once in every
layer, or that requests something it does not support, is refused by name (UserError).

Shapes: B documents, H query heads in G groups of shared keys, N queries of a chunk, K window keys, S sinks, F columns
in front of them, D, V.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from sinkmodel.attention import requests
from sinkmodel.errors import UserError
from sinkmodel.model_support import check_config
from sinkmodel.probe import rotary_of
from sinkmodel.rope import Rotary, Rotation
from sinkmodel.sinks import IN_SOFTMAX, kind_of
from sinkmodel.softmax_sinks.scores import sink_scores

ATTENTION = "sinkmodel_banded"
BLOCK = 64  # queries in one call of the attention kernel


class Band(Cache):
    """The keys that a chunk of streaming queries sees: in each layer S sinks and the window keys of all queries."""

    def __init__(self, model: Any, rotary: Rotary, budget: int, sinks: int, chunk: int):
        self.kind = model.config.model_type
        self.depth = model.config.get_text_config().num_hidden_layers
        in_softmax = kind_of(model.config) in IN_SOFTMAX
        super().__init__(layers=[BandLayer(sinks, in_softmax) for _ in range(self.depth)])
        self.rotary, self.budget, self.sinks, self.window = rotary, budget, sinks, budget - sinks
        # Positions are counted from `origin`. It moves before they become large, since fp32 RoPE loses precision, but
        # not before every key that the last move turned has left the window, so that no key is turned twice.
        self.reach = max(2 * budget, self.window + chunk)
        if rotary.limit is not None:
            self.reach = min(self.reach, rotary.limit)
        self.seen = self.origin = self.sink_origin = 0  # text indices
        self.current = -1  # the layer whose keys came last, and whose attention comes next
        self.called: list[int] = []
        self.bias: Tensor | None = None

    def keep_rows(self, rows: int) -> None:
        for layer in self.layers:
            layer.keep_rows(rows)

    def forward(self, model: Any, ids_BN: Tensor) -> Tensor:
        """Logits [B, N, V] of the next N tokens of the stream."""
        start, end = self.seen, self.seen + ids_BN.shape[1]
        self._advance(start, end, ids_BN.device)
        positions_N = torch.arange(start - self.origin, end - self.origin, device=ids_BN.device)
        self.current, self.called = -1, []
        token = _ACTIVE.set(self)
        try:
            logits_BNV = model(
                input_ids=ids_BN, position_ids=positions_N.expand(ids_BN.shape), past_key_values=self, use_cache=True
            ).logits
        finally:
            _ACTIVE.reset(token)
        if self.called != list(range(self.depth)):
            raise _not_ours(self.kind, f"{len(set(self.called))} of {self.depth} layers did")
        self.seen = end
        return logits_BNV

    def _advance(self, start: int, end: int, device: torch.device) -> None:
        """Prepare all layers for the queries start … end − 1: which keys they see, and from which places."""
        if end - self.origin > self.reach and start >= self.sinks:
            rotation = self.rotary.rotation(self.origin - start, device)
            for layer, turns in zip(self.layers, self.rotary.layers):
                if turns:
                    layer.turn(self.rotary, rotation)
            self.origin = start
        self.start = start
        for layer in self.layers:
            layer.drop_before(self._low(start))
        query_N = torch.arange(start, end)
        in_cache_N = query_N.clamp(max=self.budget - 1)
        self.to_cache = self.rotary.rotation((in_cache_N - self.sink_origin) - (query_N - self.origin), device)

    def _low(self, query: int) -> int:
        """Text index of the first window key that a query sees."""
        return max(self.sinks, query - self.window + 1)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.current = layer_idx
        return self.layers[layer_idx].update(key_states, value_states)

    def attend(self, module: Any, q_BHND: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scale: float) -> Tensor:
        """Attention over the sinks, at their distance in the cache, and the band of the window; [B, N, H, D].

        The first F columns of K are reserved; the window keys of all N queries follow. The reserved columns are for the
        sinks, followed by the model's sink in the softmax, if it has one (`softmax_sinks`), whose value is zero. In
        these columns the key is zero and the additive bias is the score, so that one fused attention computes it all.

        The queries are computed in blocks of BLOCK. Each block reads the keys from the first one that it sees, so that
        little outside of the band is computed. Its F columns overwrite keys that only earlier blocks saw, and blocks of
        the same shape differ in the bias of these columns alone, so nothing of the window's size is copied.

        Computed in fp32 also for half precision, since a score rounded to bf16 would be off by 0.4 %.
        """
        self.called.append(self.current)
        layer, dtype, (B, H, N, _) = self.layers[self.current], q_BHND.dtype, q_BHND.shape
        q_BHND, k_BGKD, v_BGKD, v_BGSD = q_BHND.float(), k_BGKD.float(), v_BGKD.float(), layer.sink_values.float()
        shared = k_BGKD.shape[1] != H
        score_BHNF = self._sink_scores(q_BHND, layer.sink_keys.float(), scale)
        own_BHN = sink_scores(module, q_BHND, scale, self.to_cache)
        if own_BHN is not None:
            score_BHNF, v_BGSD = torch.cat([score_BHNF, own_BHN[..., None]], dim=-1), F.pad(v_BGSD, (0, 0, 0, 1))
        front = score_BHNF.shape[-1]
        out_BNHD = torch.empty(B, N, H, v_BGSD.shape[-1], device=q_BHND.device)
        for first in range(0, N, BLOCK):
            last = min(first + BLOCK, N)
            low = self._low(self.start + first) - self._low(self.start)
            high = front + max(0, self.start + last - self._low(self.start))
            bias_BHNK = self._bias(B, H, last - first, front, high - low - front, q_BHND.device)
            if front:
                k_BGKD[:, :, low : low + front], v_BGKD[:, :, low : low + front] = 0, v_BGSD
                bias_BHNK[..., :front] = score_BHNF[:, :, first:last]
            q, k, v = q_BHND[:, :, first:last], k_BGKD[:, :, low:high], v_BGKD[:, :, low:high]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_BHNK, scale=scale, enable_gqa=shared)
            out_BNHD[:, first:last] = out.transpose(1, 2)
        return out_BNHD.to(dtype)

    def _sink_scores(self, q_BHND: Tensor, k_BGSD: Tensor, scale: float) -> Tensor:
        (B, H, N, D), (G, S) = q_BHND.shape, k_BGSD.shape[1:3]
        turned = self.rotary.apply(q_BHND, self.to_cache) if self.rotary.layers[self.current] else q_BHND
        score_BHNS = (turned.reshape(B, G, H // G * N, D) @ k_BGSD.transpose(-1, -2)).view(B, H, N, S) * scale
        if self.start < S:
            t_N1 = torch.arange(self.start, self.start + N, device=q_BHND.device)[:, None]
            score_BHNS.masked_fill_(torch.arange(S, device=q_BHND.device) > t_N1, float("-inf"))
        return score_BHNS

    def _bias(self, B: int, H: int, N: int, front: int, K: int, device: torch.device) -> Tensor:
        """Bias [B, H, N, F + K]: N queries over the K window keys up to the last query's own. F is filled later."""
        if self.bias is None or self.bias.shape != (B, H, N, front + K):
            distance_NK = torch.arange(K - N, K)[:, None] - torch.arange(-front, K)
            hidden = (distance_NK < 0) | (distance_NK >= self.window)
            self.bias = torch.zeros(N, front + K).masked_fill_(hidden, float("-inf")).to(device).repeat(B, H, 1, 1)
        return self.bias


class BandLayer(CacheLayerMixin):
    """One layer's keys as the model rotated them: `sink_keys` [B, G, S, D], and `keys` [B, G, K, D] of the window.

    The result of `update` has room for the sinks before the window, and for one more column if `in_softmax`.
    """

    is_sliding = False

    def __init__(self, sinks: int, in_softmax: bool):
        super().__init__()
        self.sinks, self.in_softmax = sinks, in_softmax
        self.seen = 0
        self.first = sinks  # text index of the oldest key in `keys`

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.sink_keys, self.sink_values = self.keys, self.values
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        sinks = min(max(0, self.sinks - self.seen), key_states.shape[2])  # how many of the new keys are sinks
        if sinks:
            self.sink_keys = torch.cat([self.sink_keys, key_states[:, :, :sinks]], dim=2)
            self.sink_values = torch.cat([self.sink_values, value_states[:, :, :sinks]], dim=2)
        room = self.sink_keys.shape[2] + self.in_softmax
        B, G, _, D = key_states.shape
        keys = torch.cat([key_states.new_zeros(B, G, room, D), self.keys, key_states[:, :, sinks:]], dim=2)
        empty = value_states.new_zeros(B, G, room, value_states.shape[-1])
        values = torch.cat([empty, self.values, value_states[:, :, sinks:]], dim=2)
        self.keys, self.values = keys[:, :, room:], values[:, :, room:]
        self.seen += key_states.shape[2]
        return keys, values

    def drop_before(self, low: int) -> None:
        if self.is_initialized and low > self.first:
            self.keys, self.values = self.keys[:, :, low - self.first :], self.values[:, :, low - self.first :]
            self.first = low

    def turn(self, rotary: Rotary, rotation: Rotation) -> None:
        if self.is_initialized:
            self.keys = rotary.apply(self.keys, rotation).to(self.keys.dtype)

    def keep_rows(self, rows: int) -> None:
        if self.is_initialized and rows < self.keys.shape[0]:
            self.keys, self.values = self.keys[:rows], self.values[:rows]
            self.sink_keys, self.sink_values = self.sink_keys[:rows], self.sink_values[:rows]

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 4

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        raise UserError("this model requests its own attention mask; it cannot be scored as a stream")


# ------------------------------------------------------------------------------------------ the attention function

_ACTIVE: ContextVar[Band | None] = ContextVar("sinkmodel_band", default=None)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Called by transformers in every layer, with rotated queries and keys; returns [B, N, H, D]."""
    band = _ACTIVE.get()
    if band is None:
        raise RuntimeError(f"the attention {ATTENTION!r} works only inside of streaming_nll")
    narrower = sliding_window is not None and sliding_window < band.budget  # the config may not state it
    asked = requests(attention_mask, kwargs) + ["dropout"] * bool(dropout) + ["sliding_window"] * narrower
    if asked:
        raise UserError(f"model type {band.kind!r} asks its attention for {', '.join(asked)}; streaming lacks that")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return band.attend(module, query, key, value, scale), None


AttentionInterface.register(ATTENTION, _attention)  # with no mask function: transformers then makes no mask


@contextlib.contextmanager
def banded(model: Any, budget: int) -> Iterator[Rotary]:
    """Let the model use our attention in the block. It is restored afterwards, also after an error.

    Raises UserError for a model with which `budget` keys cannot be a stream, as a StreamingCache does.
    """
    check_config(model.config.get_text_config(), budget, text=False)
    before = model.config._attn_implementation
    rotary = rotary_of(model)
    model.set_attn_implementation(ATTENTION)
    try:
        if model.config._attn_implementation != ATTENTION:
            raise _not_ours(model.config.model_type, "it does not know it")
        yield rotary
    finally:
        model.set_attn_implementation(before)


def _not_ours(kind: str, what: str) -> UserError:
    return UserError(
        f"model type {kind!r} does not send its attention through transformers' AttentionInterface "
        f"once in every layer ({what}), so it cannot be scored as a stream"
    )
