"""Plan the next forward of a ring of slots, as integers: slots to write, positions, and which keys each query sees.

Token u of a row (pads not counted) takes slot u if u < C, else slot S + (u − S) mod W, which held token u − W. Its
position for the model is u − origin, a number that stays small. While the query is at place min(u, C − 1), sink i
must be at place i (StreamingLLM, section 3.2). For the model's query at u − origin this means a turn of the sinks by

    delta = (u − origin) − min(u, C − 1)        with positions="text": −origin

from the position that the model gave them. A long input takes several plans. A plan is one of two kinds:

    placed   its keys are written first, then the slots are read: one token, or many while nothing is evicted yet
    joined   its queries see different windows, and the sinks at different turns: turned sinks, old window and new keys
             are concatenated for this forward, with a mask, and then the newest keys are written

Everything here is computed on the host. Nothing here touches a key.

Shapes: B rows, N tokens of the plan, C slots, S sinks, W = C − S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LONGEST_JOINED = 512  # most queries of one joined plan; fewer if each needs its own copy of many sinks


@dataclass(frozen=True)
class Ring:
    """The constants of a cache."""

    slots: int  # C
    sinks: int  # S
    text: bool  # sinks keep their true distance
    ordered: bool  # keys must be read in the order of the text (ALiBi)
    limit: int | None = None  # the model's positions must stay below it; None: no limit

    @property
    def window(self) -> int:
        return self.slots - self.sinks

    @property
    def reach(self) -> int:
        """Upper bound of the positions that the model is given.

        It is small, because fp32 RoPE loses precision as positions grow. It is twice the number of slots, so that no
        key is turned a second time, and the turns of the window cost one turned key per token on average.
        """
        return 2 * self.slots if self.limit is None else min(2 * self.slots, self.limit)


@dataclass
class Plan:
    """One forward of the model. Tensors are on the model's device, except those marked "on the host"."""

    columns: int  # N, pads included
    origin: list[int]  # the token of each row from which the model counts positions
    seen: list[int]  # tokens of each row after this forward
    held: int  # slots [0, held) are read
    positions_BN: Tensor
    padded: int = 0  # number of columns up to and including the last pad; 0: there are no pads
    slots_N: Tensor | None = None  # the slots to which all rows write; None: see `scatter`
    scatter: tuple[Tensor, Tensor, Tensor] | None = None  # row, column and slot of each token that is written
    delta_B: list[int] | None = None  # placed: turn of the sinks from the model's position
    order_BC: Tensor | None = None  # placed: slots in the order of the text; None: in slot order
    delta_BN: Tensor | None = None  # joined, on the host: turn of the sinks for each query, or for all (N = 1)
    mask: Tensor | None = None  # [B, 1, N, keys] bool, True if visible; None: every key that is read is visible

    @property
    def placed(self) -> bool:
        return self.delta_B is not None


def next_plan(
    ring: Ring,
    seen: list[int],
    origin: list[int],
    left: int,
    valid_BN: Tensor | None,
    with_mask: bool,
    device: torch.device,
) -> Plan:
    """The plan for as many of the next `left` columns as one forward can take.

    Args:
        seen: tokens of each row so far, without pads.
        origin: the token of each row from which the model has counted positions so far.
        valid_BN: [B, left] bool on the host, False for pads; None: there are none.
        with_mask: make a mask even if every key that is read is visible.
        device: the model's.
    """
    columns = columns_of(ring, max(seen), left)
    origin = [now if now - old + columns > ring.reach else old for now, old in zip(seen, origin)]
    if valid_BN is None:
        if len(set(zip(seen, origin))) == 1:
            if columns == 1:
                return _one_token(ring, seen, origin, with_mask, device)
            if seen[0] + columns <= ring.slots:
                return _filling(ring, seen, origin, columns, with_mask, device)
        valid_BN = torch.ones(len(seen), columns, dtype=torch.bool)
    return _any_rows(ring, seen, origin, valid_BN[:, :columns], device)


def columns_of(ring: Ring, seen: int, left: int) -> int:
    """How many columns one plan takes: all that fit without eviction; then as many as see nearly the same window.

    `seen` is the token count of the longest row.
    """
    room = ring.slots - seen
    if room > 0:
        return min(left, room)
    if ring.ordered:
        return 1
    brought = 0 if ring.text else ring.sinks  # copies of the sinks for each query, at its own turn
    most = min(LONGEST_JOINED, max(16, ring.slots // (brought + 1)))
    most = min(most, ring.window, ring.reach - ring.window)
    return min(left, max(1, most))


def _any_rows(ring: Ring, seen: list[int], origin: list[int], valid_BN: Tensor, device: torch.device) -> Plan:
    """The general case: rows with pads or of different lengths, or tokens that evict others."""
    columns = valid_BN.shape[1]
    start_B1, origin_B1 = torch.tensor(seen)[:, None], torch.tensor(origin)[:, None]
    token_BN = (start_B1 + valid_BN.cumsum(dim=1) - 1).clamp(min=0)  # a pad gets the index of the token before it
    slot_BN = slot_of(ring, token_BN)
    end = [start + int(n) for start, n in zip(seen, valid_BN.sum(dim=1))]
    whole = bool(valid_BN.all())
    plan = Plan(
        columns=columns,
        origin=origin,
        seen=end,
        held=min(max(end), ring.slots),
        positions_BN=(token_BN - origin_B1).clamp(min=0).to(device),
        padded=0 if whole else int((~valid_BN).any(dim=0).nonzero().max()) + 1,
    )
    if whole and len(set(seen)) == 1:
        plan.slots_N = slot_BN[0].to(device)
    else:
        row, column = valid_BN.nonzero(as_tuple=True)
        plan.scatter = (row.to(device), column.to(device), slot_BN[row, column].to(device))
    delta_BN = sink_turn(ring, token_BN, origin_B1)
    if columns == 1 or max(end) <= ring.slots:
        plan.delta_B = delta_BN[:, -1].tolist()
        seen_BNC = torch.arange(plan.held) <= token_BN[:, :, None]  # all slots, once the row is full
        if ring.ordered and max(end) > ring.slots:
            plan.order_BC = torch.stack([in_order(ring, n) for n in end]).to(device)
        plan.mask = seen_BNC[:, None].to(device)
    else:
        same = bool((delta_BN == delta_BN[:, :1]).all())
        plan.delta_BN = (delta_BN[:, :1] if same else delta_BN).to("cpu")
        plan.mask = joined_mask(ring, start_B1, token_BN, valid_BN, 1 if same else columns)[:, None].to(device)
    return plan


def _one_token(ring: Ring, seen: list[int], origin: list[int], with_mask: bool, device: torch.device) -> Plan:
    """One decoding step with equal rows: every slot in use is visible."""
    token, rows = seen[0], len(seen)
    slot = token if token < ring.slots else ring.sinks + (token - ring.sinks) % ring.window
    held = min(token + 1, ring.slots)
    delta = -origin[0] if ring.text else token - origin[0] - min(token, ring.slots - 1)
    plan = Plan(
        columns=1,
        origin=origin,
        seen=[token + 1] * rows,
        held=ring.slots if with_mask else held,
        positions_BN=torch.full((rows, 1), token - origin[0], device=device),
        slots_N=torch.full((1,), slot, device=device),
        delta_B=[delta] * rows,
    )
    if with_mask:  # with its final shape, so that a compiled step is compiled once
        plan.mask = (torch.arange(ring.slots) < held).expand(rows, 1, 1, -1).to(device)
    if ring.ordered and token >= ring.slots:
        plan.order_BC = in_order(ring, token + 1).expand(rows, -1).to(device)
    return plan


def _filling(
    ring: Ring, seen: list[int], origin: list[int], columns: int, with_mask: bool, device: torch.device
) -> Plan:
    """Several tokens, equal rows, nothing evicted yet: plain causal attention."""
    start, end = seen[0], seen[0] + columns
    token_N = torch.arange(start, end)
    plan = Plan(
        columns=columns,
        origin=origin,
        seen=[end] * len(seen),
        held=end,
        positions_BN=(token_N - origin[0]).expand(len(seen), -1).to(device),
        slots_N=token_N.to(device),
        delta_B=[-origin[0]] * len(seen),
    )
    if with_mask or start:
        causal_NK = torch.arange(end) <= token_N[:, None]
        plan.mask = causal_NK.expand(len(seen), 1, -1, -1).to(device)
    return plan


def slot_of(ring: Ring, token: Tensor) -> Tensor:
    return torch.where(token < ring.slots, token, ring.sinks + (token - ring.sinks) % ring.window)


def sink_turn(ring: Ring, token: Tensor, origin: Tensor) -> Tensor:
    return (-origin).expand_as(token) if ring.text else token - origin - token.clamp(max=ring.slots - 1)


def in_order(ring: Ring, seen: int) -> Tensor:
    """Slots [C] in text order after `seen` tokens; in slot order while the ring is not full."""
    if seen <= ring.slots:
        return torch.arange(ring.slots)
    oldest = torch.arange(seen - ring.window, seen)
    return torch.cat([torch.arange(ring.sinks), slot_of(ring, oldest)])


def token_in_slot(ring: Ring, start_B1: Tensor) -> Tensor:
    """The token in each slot of the window after `start` tokens, [B, W]; −1 if the slot is empty."""
    first = ring.sinks + torch.arange(ring.window)  # the first token that a slot holds
    rounds = (start_B1 - 1 - first).div(ring.window, rounding_mode="floor")
    return torch.where(rounds >= 0, first + rounds * ring.window, -1)


def joined_mask(ring: Ring, start_B1: Tensor, token_BN: Tensor, valid_BN: Tensor, turns: int) -> Tensor:
    """Visibility in a joined plan, [B, N, turns × S + W + N]: sinks (one set per turn), old window, new keys."""
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
    new |= torch.eye(N, dtype=torch.bool) & ~valid_BN[:, :, None]  # a pad sees itself: no row of the mask is empty
    return torch.cat([sinks, window.expand(B, N, -1), new], dim=2)
