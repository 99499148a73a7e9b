"""What a cache policy is: what it must see of attention, which keys it keeps, and at which positions.

    dense             every key so far
    window  0+C       the C latest keys, each computed once: StreamingLLM Figure 1 (b), `--start_size 0` of its code
    recompute S+W     the model read anew over the last C tokens for every query: Figure 1 (c)
    sink    S+W       the first S keys, kept for good, and the W = C − S latest, placed right behind them: Figure 1 (d)

Both (b) and (c) are called window attention, and are far apart: what (b) keeps was computed when older tokens could
still be seen, and none of it is the first of anything (streaming-llm issues #33 and #39, which asks for both in all
results). `window-paper` and `sink-paper` are (b) and (d) counted as the paper's code counts: it evicts after the
forward, so a query sees C + 1 keys (design, decision 8).

A new policy is a file with a class that answers the questions of `Policy` below; nothing else knows how it decides.
What compresses a prompt instead of streaming is a memory (`sinkmodel.memories`).
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

PIECE = 256  # tokens of a long `feed` that go through the model together
# What transformers calls a table of positions, learned or of sines.
TABLES = {"embed_positions", "pos_encoding", "position_embeddings", "positions_embed", "wpe"}


class Policy(ABC):
    name: str  # as --policies has it
    sinks: int  # S, how many of the first tokens are kept for good
    budget: int | None  # C, cache slots with the current token; None: without bound
    needs: str  # what it must see of attention before it evicts
    positions: str  # where a kept key stands for a query: its place in the text, the cache or the window

    @property
    @abstractmethod
    def keeps(self) -> str:
        """Which keys survive, in words."""

    @abstractmethod
    def score(
        self, model: Any, documents: Sequence[Sequence[int]], chunk: int, on_chunk: Callable[[int], None]
    ) -> list[Tensor]:
        """−log p of every next token, one fp32 tensor [T − 1] a document of T ids.

        `chunk` queries are computed together, and `on_chunk` is told how many were scored since the last call.
        """

    @abstractmethod
    def stream(self, model: Any) -> Stream:
        """A new stream, fed step by step as a server does."""

    @property
    def window(self) -> int | None:
        return None if self.budget is None else self.budget - self.sinks

    @property
    def label(self) -> str:
        return self.name if self.budget is None else f"{self.name} {self.sinks}+{self.window}"

    def keys_seen(self, longest: int) -> int:
        """The most keys that a query sees, its own counted, in a stream of `longest` fed tokens."""
        return longest if self.budget is None else min(longest, self.budget)

    def row(self, longest: int) -> dict[str, Any]:
        """What a result's row says of its policy (the JSON of the design, "Commands")."""
        return {
            "policy": self.name,
            "label": self.label,
            "sinks": self.sinks,
            "window": self.window,
            "budget": self.budget,
            "keys_seen": self.keys_seen(longest),
            "needs": self.needs,
            "keeps": self.keeps,
            "positions": self.positions,
        }


class Stream(ABC):
    @abstractmethod
    def feed(self, ids_BN: Tensor) -> Tensor:
        """Take the next N tokens of B streams; logits [B, V] after the last of them."""

    @abstractmethod
    def feed_all(self, ids_BN: Tensor) -> Tensor:
        """The same, with the logits [B, N, V] after each of them."""

    @abstractmethod
    def fork(self) -> Stream:
        """A copy that goes on by itself: what it is fed leaves no trace in this one."""


class CachedStream(Stream):
    """A stream whose memory is a transformers cache, which alone decides what stays."""

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
        """Logits [B, n, V] of each piece, after its last `keep` tokens; 0: after all."""
        return [
            self.model(input_ids=piece_BN, past_key_values=self.cache, use_cache=True, logits_to_keep=keep).logits
            for piece_BN in ids_BN.split(PIECE, dim=1)
        ]


def refuse_narrower_window(model: Any, keys: int) -> None:
    """UserError where the model's own attention is narrower than the `keys` that a row says its queries see."""
    own = own_window(model.config.get_text_config())
    if own is not None and own < keys:
        raise UserError(
            f"model type {model.config.model_type!r} has a window of {own} of its own, narrower than the {keys} "
            f"keys that a query is to see; use no more than {own}"
        )


def end_of(model: Any) -> int | None:
    """How many places of a text dense attention reads in one way; None: no end.

    Behind them a table of positions has no row, or rotary frequencies become others than those of the keys so far, and
    the numbers depend on where the text was cut into chunks.
    """
    config = model.config.get_text_config()
    if config.model_type == "mpt":  # a table too, of ALiBi
        return config.max_seq_len
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    if any(TABLES & set(name.split(".")) for name in names):
        return config.max_position_embeddings
    try:
        return frequencies(model)[1]
    except UserError:  # no rotary positions, or several kinds of them
        return None
