"""Plan one call of the model: its columns, their positions, and their mask. Only integers and masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sinkmodel.cache.inputs import Request
from sinkmodel.memories.layer import MemoryLayer
from sinkmodel.memories.selection import EMPTY
from sinkmodel.probe import Traits

Implementation = Literal["sdpa", "eager", "flash"]  # the kind of the model's attention
LONGEST_MASKED = 512  # most queries of a piece with a mask, so that the mask stays small


@dataclass
class Piece:
    """N columns of a request, for B rows; K slots are in use before it."""

    start: int
    end: int
    ends_prompt: bool
    evicts: bool
    seen: list[int]  # tokens of each row after this piece
    token_BN: Tensor  # position in the text; `EMPTY` for pads
    place_BN: Tensor  # position that the model is given
    valid_BN: Tensor | None  # False for pads; None: there are none
    full_BK: Tensor | None  # [B, K + N], False for slots without a token; None: all have one
    mask: Tensor | None  # [B or 1, 1, N, K + N], True if visible; None: causal from the first slot on, or all


class Progress(Protocol):
    """How far a memory has read; its attributes are described in `Memory`."""

    columns: int
    seen: list[int]
    kept: list[int]
    shift: list[int]
    expected: int | None
    ended: bool
    even: bool
    implementation: Implementation
    traits: Traits | None
    layers: list[MemoryLayer]

    def columns_to_next_event(self, valid_BT: Tensor | None = None) -> int: ...

    def evicts_after(self, count: int, seen: list[int]) -> bool: ...


def next_piece(memory: Progress, request: Request, done: int) -> Piece:
    """The next piece of `request`: as many columns from `done` on as can be read at once."""
    assert memory.traits is not None
    device = memory.traits.device
    valid = None if request.valid_BT is None else request.valid_BT[:, done:]
    count = request.tokens.shape[1] - done
    if memory.implementation != "flash" and (memory.columns or valid is not None or memory.implementation == "eager"):
        count = min(count, LONGEST_MASKED)
    count = min(count, memory.columns_to_next_event(valid))
    if valid is not None:
        valid = None if bool(valid[:, :count].all()) else valid[:, :count]
    token_BN = positions_in_text(memory.seen, count, valid)
    slots = memory.layers[0].length
    seen = [n + more for n, more in zip(memory.seen, lengths(count, valid, len(memory.seen)))]
    full = None
    if memory.even and (valid is not None or min(memory.kept) < slots):
        full = torch.ones(len(memory.seen), count, dtype=torch.bool) if valid is None else valid
        full = full.to(device)
        if slots:
            full = torch.cat([memory.layers[0].held_positions()[:, 0] != EMPTY, full], dim=1)
    return Piece(
        start=done,
        end=done + count,
        ends_prompt=not memory.ended and memory.expected == memory.columns + count,
        evicts=memory.evicts_after(count, seen),
        seen=seen,
        token_BN=token_BN.to(device, torch.int32),
        place_BN=(token_BN - torch.tensor(memory.shift)[:, None]).clamp(min=0).to(device),
        valid_BN=None if valid is None else valid.to(device),
        full_BK=full,
        mask=visible(full, slots, count, memory.implementation, device) if memory.even else None,
    )


def lengths(count: int, valid_BN: Tensor | None, rows: int) -> list[int]:
    """Number of tokens of each row in `count` columns."""
    return [count] * rows if valid_BN is None else valid_BN.sum(dim=1).tolist()


def positions_in_text(seen: list[int], count: int, valid_BN: Tensor | None) -> Tensor:
    """Positions [B, N] of the next `count` columns of rows that have `seen` tokens; `EMPTY` for pads."""
    seen_B1 = torch.tensor(seen)[:, None]
    if valid_BN is None:
        return seen_B1 + torch.arange(count)
    return (seen_B1 + valid_BN.cumsum(dim=1) - 1).masked_fill(~valid_BN, EMPTY)


def visible(
    full_BK: Tensor | None, slots: int, count: int, implementation: Implementation, device: torch.device
) -> Tensor | None:
    """The mask [B or 1, 1, N, K + N] of `count` queries after `slots` slots; None if the kernel needs none.

    A pad sees itself, so that no softmax is over nothing. Without a mask, sdpa is causal from the first slot on, flash
    is causal up to the last one, and eager sees everything.
    """
    if full_BK is None and (count == 1 or implementation == "flash" or (slots == 0 and implementation == "sdpa")):
        return None
    seen = torch.ones(count, slots + count, dtype=torch.bool, device=device).tril(slots)
    if full_BK is None:
        return seen[None, None]
    own = torch.zeros_like(seen)
    own[:, slots:] = torch.eye(count, dtype=torch.bool, device=device)
    return (seen & full_BK[:, None] | own)[:, None]


def ranks(positions_BGK: Tensor) -> Tensor:
    """The rank of each slot's token in the text order of its head, from 0; below 0 for empty slots."""
    order = positions_BGK.argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return rank - (positions_BGK == EMPTY).sum(dim=-1, keepdim=True)
