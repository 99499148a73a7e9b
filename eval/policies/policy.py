"""The interface of a cache policy: which keys it keeps, at which positions, and what it needs to see of attention.

    dense             every key so far
    window  0+C       the C latest keys, each computed once: StreamingLLM Figure 1 (b), `--start_size 0` of its code
    recompute S+W     a new forward over the last C tokens for every query: Figure 1 (c)
    sink    S+W       the first S keys, never evicted, followed directly by the W = C − S latest: Figure 1 (d)

Both (b) and (c) are called window attention, but they give very different results. The keys of (b) were computed when
older tokens were still visible, and none of them belongs to a first token (streaming-llm issues #33 and #39; the latter
asks for both in all results). `window-paper` and `sink-paper` are (b) and (d) with the paper's count of keys: its code
evicts after the forward, so a query sees C + 1 keys (DESIGN.md, "The budget includes the current token").

A new policy is a subclass of `Policy` in a file of its own; no other file depends on how it decides. Methods that
compress a prompt instead of streaming are memories (`sinkmodel.memories`).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from sinkmodel.errors import UserError
from sinkmodel.model_support import own_window
from sinkmodel.probe import frequencies
from sinkmodel.results.parts import PolicyFields

PIECE = 256  # tokens of a long `feed` in one forward
# Names of position tables in transformers, learned or sinusoidal.
TABLES = {"embed_positions", "pos_encoding", "position_embeddings", "positions_embed", "wpe"}


class Policy(ABC):
    name: str  # as given to --policies
    sinks: int  # S, number of leading tokens that are never evicted
    budget: int | None  # C, cache slots including the current token; None: unbounded
    needs: str  # what it needs to see of attention before it evicts
    positions: str  # what a kept key's position counts in: the text, the cache or the window

    @property
    @abstractmethod
    def keeps(self) -> str:
        """Which keys survive, in words."""

    @abstractmethod
    def score(
        self, model: Any, documents: Sequence[Sequence[int]], chunk: int, on_chunk: Callable[[int], None]
    ) -> list[Tensor]:
        """−log p of every next token: one fp32 tensor [T − 1] for a document of T ids.

        `chunk` queries are computed together. `on_chunk` is called with the number of queries scored since its last
        call.
        """

    @abstractmethod
    def stream(self, model: Any) -> Stream:
        """A new stream, which is fed step by step, as in a server."""

    @property
    def window(self) -> int | None:
        return None if self.budget is None else self.budget - self.sinks

    @property
    def label(self) -> str:
        return self.name if self.budget is None else f"{self.name} {self.sinks}+{self.window}"

    def keys_seen(self, longest: int) -> int:
        """The most keys that a query sees, including its own, in a stream of `longest` fed tokens."""
        return longest if self.budget is None else min(longest, self.budget)

    def row(self, longest: int) -> PolicyFields:
        """The fields of a result row that describe its policy, for a stream of `longest` fed tokens."""
        return PolicyFields(
            policy=self.name,
            label=self.label,
            sinks=self.sinks,
            window=self.window,
            budget=self.budget,
            keys_seen=self.keys_seen(longest),
            needs=self.needs,
            keeps=self.keeps,
            positions=self.positions,
        )


class Stream(ABC):
    @abstractmethod
    def feed(self, ids_BN: Tensor) -> Tensor:
        """Feed the next N tokens of B streams; returns the logits [B, V] after the last of them."""

    @abstractmethod
    def feed_all(self, ids_BN: Tensor) -> Tensor:
        """Feed the next N tokens of B streams; returns the logits [B, N, V] after each of them."""

    @abstractmethod
    def fork(self) -> Stream:
        """An independent copy: feeding it does not change this stream."""


class CachedStream(Stream):
    """A stream with a transformers cache, which alone decides which keys are kept."""

    def __init__(self, model: Any, cache: Cache):
        self.model, self.cache = model, cache

    def feed(self, ids_BN: Tensor) -> Tensor:
        return self._forward(ids_BN, 1)[-1][:, -1]

    def feed_all(self, ids_BN: Tensor) -> Tensor:
        return torch.cat(self._forward(ids_BN, 0), dim=1)

    def fork(self) -> CachedStream:
        return CachedStream(self.model, copy.deepcopy(self.cache))

    @torch.inference_mode()
    def _forward(self, ids_BN: Tensor, keep: int) -> list[Tensor]:
        """Logits [B, n, V] of each piece, after its last `keep` tokens; 0: after all its tokens."""
        return [
            self.model(input_ids=piece_BN, past_key_values=self.cache, use_cache=True, logits_to_keep=keep).logits
            for piece_BN in ids_BN.split(PIECE, dim=1)
        ]


def refuse_narrower_window(model: Any, keys: int) -> None:
    """Raise UserError if the model's own window is narrower than `keys`, the keys that a query must see."""
    own = own_window(model.config.get_text_config())
    if own is not None and own < keys:
        raise UserError(
            f"model type {model.config.model_type!r} has its own window of {own}, narrower than the {keys} "
            f"keys that a query is to see; use no more than {own}"
        )


def end_of(model: Any) -> int | None:
    """Number of positions that dense attention can read with one kind of positions; None: no limit.

    Beyond it a position table has no row, or the rotary frequencies change and no longer match those of earlier keys.
    Then the numbers would depend on where the text is cut into chunks.
    """
    config = model.config.get_text_config()
    if config.model_type == "mpt":  # its ALiBi is a table too
        return config.max_seq_len
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    if any(TABLES & set(name.split(".")) for name in names):
        return config.max_position_embeddings
    try:
        return frequencies(model)[1]
    except UserError:  # no rotary positions, or several kinds of them
        return None
