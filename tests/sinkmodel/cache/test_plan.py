"""Guards the arithmetic of the ring (slots, positions, turns, masks) against a ring that is played token by token."""

from __future__ import annotations

import pytest
import torch

from sinkmodel.cache.plan import Ring, columns_of, next_plan

CPU = torch.device("cpu")
RINGS = [
    Ring(slots=6, sinks=2, text=False, ordered=False),
    Ring(slots=6, sinks=2, text=True, ordered=False),
    Ring(slots=5, sinks=0, text=False, ordered=False),
    Ring(slots=7, sinks=6, text=False, ordered=False),
    Ring(slots=6, sinks=2, text=False, ordered=True),
    Ring(slots=8, sinks=1, text=False, ordered=False, limit=9),
]


class Row:
    """One row, slot by slot: which token each one holds, after StreamingLLM's definition and nothing else."""

    def __init__(self, ring: Ring):
        self.ring, self.seen, self.held = ring, 0, {}  # slot → token

    def feed(self) -> tuple[int, int]:
        """The slot of the next token, and its number."""
        token = self.seen
        if token < self.ring.slots:
            slot = token
        else:  # the oldest that is not a sink
            slot = min((t, s) for s, t in self.held.items() if t >= self.ring.sinks)[1]
        self.held[slot], self.seen = token, token + 1
        return slot, token

    def visible(self) -> set[int]:
        """The tokens that the query of the latest token sees: the first S, and as many of the latest as fit."""
        seen, ring = self.seen, self.ring
        return set(range(seen)) if seen <= ring.slots else {*range(ring.sinks), *range(seen - ring.window, seen)}


def played(ring: Ring, lengths: list[int], masks: list[torch.Tensor | None], rows: int, with_mask: bool) -> int:
    """Feed inputs of these lengths, hold each plan to the rows; how many plans it took."""
    truth = [Row(ring) for _ in range(rows)]
    seen, origin, plans = [0] * rows, [0] * rows, 0
    for length, valid in zip(lengths, masks):
        done = 0
        while done < length:
            rest = None if valid is None else valid[:, done:]
            plan = next_plan(ring, seen, origin, length - done, rest, with_mask, CPU)
            assert 1 <= plan.columns <= length - done
            now = torch.ones(rows, plan.columns, dtype=torch.bool) if rest is None else rest[:, : plan.columns]
            pads = (~now).any(0).nonzero().flatten().tolist()
            assert plan.padded == (pads[-1] + 1 if pads else 0)
            for b, row in enumerate(truth):
                check_row(ring, plan, b, row, now[b], origin[b])
            seen, origin, done, plans = plan.seen, plan.origin, done + plan.columns, plans + 1
            assert seen == [row.seen for row in truth]
    return plans


def check_row(ring: Ring, plan, b: int, row: Row, valid_N: torch.Tensor, old_origin: int) -> None:
    before, start = dict(row.held), row.seen
    late = start - old_origin + plan.columns > ring.reach
    assert plan.origin[b] == (start if late else old_origin)
    fed = [(n, *row.feed(), row.visible()) for n in valid_N.nonzero().flatten().tolist()]
    for n, slot, token, visible in fed:
        assert written(plan, b, n) == slot
        position = int(plan.positions_BN[b, n])
        assert position == token - plan.origin[b]
        assert 0 <= position < ring.reach
        place = min(token, ring.slots - 1)  # of the query in the cache; a sink i is at i
        turn = position - place if not ring.text else -plan.origin[b]
        if plan.delta_B is None:
            assert int(plan.delta_BN[b, n if plan.delta_BN.shape[1] > 1 else 0]) == turn
        elif token >= ring.sinks and plan.columns == 1:
            assert plan.delta_B[b] == turn
        assert seen_tokens(ring, plan, b, n, before, start, row) == visible


def written(plan, b: int, n: int) -> int:
    if plan.slots_N is not None:
        return int(plan.slots_N[n])
    row, column, slot = plan.scatter
    (at,) = ((row == b) & (column == n)).nonzero().flatten().tolist()
    return int(slot[at])


def seen_tokens(ring: Ring, plan, b: int, n: int, before: dict[int, int], start: int, row: Row) -> set[int]:
    """The tokens whose keys the query of column n sees, by the mask over what is read."""
    columns = plan.columns
    if plan.placed:
        keys = [row.held.get(slot) for slot in range(plan.held)]
        if plan.order_BC is not None:
            keys = [row.held.get(slot) for slot in plan.order_BC[b].tolist()]
            assert keys[: len(row.held)] == sorted(row.held.values())
    else:
        turns = plan.delta_BN.shape[1]
        window = [before.get(slot) for slot in range(ring.sinks, ring.slots)]
        new = (plan.positions_BN[b] + plan.origin[b]).tolist()  # a pad counts as the token before it
        keys = [*(list(range(ring.sinks)) * turns), *window, *new]
        own = range(n * ring.sinks, (n + 1) * ring.sinks) if turns > 1 else range(ring.sinks)
        sinks = plan.mask[b, 0, n, : turns * ring.sinks].nonzero().flatten().tolist()
        assert set(sinks) <= set(own), "sinks at a turn of another query"
    mask = torch.ones(len(keys), dtype=torch.bool) if plan.mask is None else plan.mask[b, 0, n]
    assert mask.shape == (len(keys),)
    found = [keys[k] for k in mask.nonzero().flatten().tolist()]
    if plan.mask is None and columns > 1:  # plain causal attention
        found = [token for token in found if token <= start + n]
    assert None not in found, "a slot that holds nothing"
    assert len(found) == len(set(found)), "a key that is seen twice"
    return set(found)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("lengths", [[1] * 40, [40], [3, 1, 17, 1, 1, 9], [6, 6, 6, 1, 30]], ids=str)
@pytest.mark.parametrize("ring", RINGS, ids=str)
def test_equal_rows(ring, lengths, with_mask):
    """Risk: one slot, one position or one key too many or too few, at any point of the stream."""
    plans = played(ring, lengths, [None] * len(lengths), 2, with_mask)
    assert len(lengths) <= plans <= sum(lengths)


@pytest.mark.parametrize("lengths", [[1] * 40, [40], [3, 1, 17, 1, 1, 9]], ids=str)
@pytest.mark.parametrize("ring", RINGS, ids=str)
def test_rows_with_pads_anywhere(ring, lengths):
    """Risk: a pad takes a slot or a position, or rows that are full at different times disturb each other."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.rand(3, sum(lengths), generator=generator) > torch.tensor([[0.0], [0.4], [0.8]])
    played(ring, lengths, list(whole.split(lengths, dim=1)), 3, False)


def test_how_many_columns_one_plan_takes():
    """Risk: a long prompt goes token by token, or a joined plan evicts keys that its own queries still see."""
    ring = Ring(slots=64, sinks=1, text=False, ordered=False)
    assert [columns_of(ring, seen, 1000) for seen in (0, 63, 64, 999)] == [64, 1, 32, 32]
    assert columns_of(ring, 64, 5) == 5
    assert columns_of(Ring(64, 0, False, False), 64, 1000) == 64
    assert columns_of(Ring(64, 31, False, False), 64, 1000) == 16, "sinks at a turn of their own, by each query"
    assert columns_of(Ring(64, 31, True, False), 64, 1000) == 33, "at the same turn for all: the window"
    assert columns_of(Ring(64, 1, False, True), 64, 1000) == 1
    assert columns_of(Ring(4096, 1, False, False), 5000, 9000) == 512
    assert columns_of(Ring(64, 4, False, False, limit=65), 64, 1000) == 5


def test_positions_are_counted_anew_in_time():
    """Risk: the model is given a position that it does not have, or turns its window at every step."""
    for limit, reach in ((None, 128), (1000, 128), (100, 100)):
        ring = Ring(slots=64, sinks=4, text=False, ordered=False, limit=limit)
        assert ring.reach == reach
        seen, origin, moved = [64], [0], []
        for _ in range(300):
            plan = next_plan(ring, seen, origin, 1, None, False, CPU)
            moved += [seen[0]] * (plan.origin != origin)
            seen, origin = plan.seen, plan.origin
        assert moved[:2] == [reach, 2 * reach]
        assert len(moved) == (64 + 299) // reach
