"""What one piece of a stream does to a ring of slots: which key goes where, who sees whom, at which positions.

Token u of a row (pads not counted) takes slot u while u < C, afterwards slot S + (u − S) mod W, where it takes the
place of token u − W. The model numbers it u − origin, a number that stays small. Sinks are wanted at place i while the
query stands at place min(u, C − 1) (StreamingLLM, section 3.2): for the model's query at u − origin that is a turn of

    delta = (u − origin) − min(u, C − 1)        with positions="text" −origin

from where the model put them. A piece is one of two kinds:

    placed   its keys are written, then the slots are read: one token, or many while nothing is evicted yet
    joined   its queries see different windows, and sinks at different turns: turned sinks, old window and new keys are
             joined for this once, with a mask, and then the newest are written

Everything here is integers on the host; nothing touches a key.

Shapes: B rows, N tokens of the piece, C slots, S sinks, W = C − S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ring:
    """The constants of a cache."""

    slots: int  # C
    sinks: int  # S
    text: bool  # sinks keep their distance in the text
    ordered: bool  # keys must be read in the order of the text (ALiBi)

    @property
    def window(self) -> int:
        return self.slots - self.sinks


@dataclass
class Piece:
    """One piece, as tensors on the device of the model; `None` where there is nothing to say."""

    positions_BN: Tensor
    seen: list[int]  # tokens of each row when it is done
    held: int  # slots [0, held) are read
    slots_N: Tensor | None = None  # where all rows write; else
    scatter: tuple[Tensor, Tensor, Tensor] | None = None  # row, column and slot of each token that is written
    delta_B: list[int] | None = None  # placed: how far sinks are turned from where the model put them
    order_BC: Tensor | None = None  # placed: slots in the order of the text
    delta_BN: Tensor | None = None  # joined: the turn of the sinks for each query, or for all of them (N = 1)
    mask: Tensor | None = None  # [B, 1, N, keys] bool, True where seen; None: everything that is read is seen


def plan(
    ring: Ring,
    seen: list[int],
    origin: list[int],
    columns: int,
    valid_BN: Tensor | None,
    with_mask: bool,
    device: torch.device,
) -> Piece:
    """The piece of `columns` tokens that comes next; `valid_BN` (bool, on the host) is False for pads."""
    if valid_BN is None and len(set(zip(seen, origin))) == 1:
        if columns == 1:
            return _one_token(ring, seen, origin, with_mask, device)
        if seen[0] + columns <= ring.slots:
            return _filling(ring, seen, origin, columns, with_mask, device)
    start_B1 = torch.tensor(seen)[:, None]
    if valid_BN is None:
        valid_BN = torch.ones(len(seen), columns, dtype=torch.bool)
    token_BN = (start_B1 + valid_BN.cumsum(dim=1) - 1).clamp(min=0)  # a pad counts as the token before it
    position_BN = (token_BN - torch.tensor(origin)[:, None]).clamp(min=0)
    slot_BN = slot_of(ring, token_BN)
    end = [start + int(n) for start, n in zip(seen, valid_BN.sum(dim=1))]
    piece = Piece(
        positions_BN=position_BN.to(device),
        seen=end,
        held=min(max(end), ring.slots),
    )
    if bool(valid_BN.all()) and len(set(seen)) == 1:
        piece.slots_N = slot_BN[0].to(device)
    else:
        row, column = valid_BN.nonzero(as_tuple=True)
        piece.scatter = (row.to(device), column.to(device), slot_BN[row, column].to(device))
    delta_BN = sink_turn(ring, token_BN, torch.tensor(origin)[:, None])
    if columns == 1 or max(end) <= ring.slots:
        piece.delta_B = delta_BN[:, -1].tolist()
        seen_BNC = torch.arange(piece.held) <= token_BN[:, :, None]  # all of them, once the row is full
        if ring.ordered and max(end) > ring.slots:
            piece.order_BC = torch.stack([in_order(ring, n) for n in end]).to(device)
        piece.mask = seen_BNC[:, None].to(device)
    else:
        same = bool((delta_BN == delta_BN[:, :1]).all())
        piece.delta_BN = (delta_BN[:, :1] if same else delta_BN).to("cpu")
        piece.mask = joined_mask(ring, start_B1, token_BN, valid_BN, 1 if same else columns)[:, None].to(device)
    return piece


def _one_token(ring: Ring, seen: list[int], origin: list[int], with_mask: bool, device: torch.device) -> Piece:
    """The step of decoding, rows alike: everything that is held is seen."""
    token, rows = seen[0], len(seen)
    slot = token if token < ring.slots else ring.sinks + (token - ring.sinks) % ring.window
    held = min(token + 1, ring.slots)
    delta = -origin[0] if ring.text else token - origin[0] - min(token, ring.slots - 1)
    piece = Piece(
        positions_BN=torch.full((rows, 1), token - origin[0], device=device),
        seen=[token + 1] * rows,
        held=ring.slots if with_mask else held,
        slots_N=torch.full((1,), slot, device=device),
        delta_B=[delta] * rows,
    )
    if with_mask:  # of the shape that it has for good, so that a compiled step is compiled once
        piece.mask = (torch.arange(ring.slots) < held).expand(rows, 1, 1, -1).to(device)
    if ring.ordered and token >= ring.slots:
        piece.order_BC = in_order(ring, token + 1).expand(rows, -1).to(device)
    return piece


def _filling(
    ring: Ring, seen: list[int], origin: list[int], columns: int, with_mask: bool, device: torch.device
) -> Piece:
    """Several tokens, rows alike, nothing evicted yet: plain causal attention."""
    start, end = seen[0], seen[0] + columns
    token_N = torch.arange(start, end)
    piece = Piece(
        positions_BN=(token_N - origin[0]).expand(len(seen), -1).to(device),
        seen=[end] * len(seen),
        held=end,
        slots_N=token_N.to(device),
        delta_B=[-origin[0]] * len(seen),
    )
    if with_mask or start:
        causal_NK = torch.arange(end) <= token_N[:, None]
        piece.mask = causal_NK.expand(len(seen), 1, -1, -1).to(device)
    return piece


def slot_of(ring: Ring, token: Tensor) -> Tensor:
    return torch.where(token < ring.slots, token, ring.sinks + (token - ring.sinks) % ring.window)


def sink_turn(ring: Ring, token: Tensor, origin: Tensor) -> Tensor:
    return (-origin).expand_as(token) if ring.text else token - origin - token.clamp(max=ring.slots - 1)


def in_order(ring: Ring, seen: int) -> Tensor:
    """Slots [C] from the first token to the latest, after `seen` tokens; as they are where the ring is not full."""
    if seen <= ring.slots:
        return torch.arange(ring.slots)
    oldest = torch.arange(seen - ring.window, seen)
    return torch.cat([torch.arange(ring.sinks), slot_of(ring, oldest)])


def token_in_slot(ring: Ring, start_B1: Tensor) -> Tensor:
    """The token that each slot of the window holds after `start` tokens, [B, W]; −1 for none."""
    first = ring.sinks + torch.arange(ring.window)  # what a slot holds first
    rounds = (start_B1 - 1 - first).div(ring.window, rounding_mode="floor")
    return torch.where(rounds >= 0, first + rounds * ring.window, -1)


def joined_mask(ring: Ring, start_B1: Tensor, token_BN: Tensor, valid_BN: Tensor, turns: int) -> Tensor:
    """Who sees whom in a joined piece, [B, N, turns × S + W + N]: sinks (one set a turn), the old window, the piece."""
    B, N = token_BN.shape
    query_BN1, oldest_BN1 = token_BN[:, :, None], token_BN[:, :, None] - ring.window
    sink_S = torch.arange(ring.sinks)
    sinks_BNS = (sink_S <= query_BN1) & (sink_S < start_B1[:, :, None])
    own = torch.eye(N, dtype=torch.bool) if turns > 1 else torch.ones(N, 1, dtype=torch.bool)
    sinks = (own[:, :, None] & sinks_BNS[:, :, None]).flatten(2)  # [B, N, turns × S]
    held_B1W = token_in_slot(ring, start_B1)[:, None]
    window = (held_B1W >= 0) & (held_B1W > oldest_BN1)
    key_B1N = token_BN[:, None]
    new = valid_BN[:, None] & (key_B1N <= query_BN1) & ((key_B1N > oldest_BN1) | (key_B1N < ring.sinks))
    new |= torch.eye(N, dtype=torch.bool) & ~valid_BN[:, :, None]  # a pad sees itself: no row of nothing
    return torch.cat([sinks, window.expand(B, N, -1), new], dim=2)
