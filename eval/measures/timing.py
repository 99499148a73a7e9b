"""Times of decoding steps; several policies take turns, so that a disturbance affects all of them.

A side is a policy with a full stream. In every round the sides run in a new random order. Each side takes one step that
is not timed, to warm up the processor's caches after the side before it, and then its block of timed steps. A ratio
compares two blocks of the same round.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from eval.measures.meters import PeakMemory, memory_now
from eval.measures.statistics import paired_ratio, quantile
from eval.policies.policy import CachedStream, Policy, Stream
from eval.policies.recompute import Recompute
from sinkmodel.loading import LoadedModel
from sinkmodel.progress import CountedProgress
from sinkmodel.results.latency import LatencyRow, Ratio, StreamRow

RATIOS = (("recompute", "sink"), ("sink", "dense"))
PIECE = 4096  # tokens of a long stream that are drawn and fed at once
BLOCK = 8  # timed steps of a side in a round; recompute takes one, which is long enough


def measure(
    loaded: LoadedModel, policies: list[Policy], budget: int, tokens: int, label: str
) -> tuple[list[LatencyRow], list[Ratio]]:
    """Measure the policies at one budget; returns result rows and ratios."""
    model, sink_ids, peaks, sides = loaded.model, loaded.sink_ids, [], []
    rounds = -(-tokens // BLOCK)
    total = rounds * sum(map(block_of, policies)) + 2 * len(policies)
    with CountedProgress(label, "steps", total) as progress:
        for policy in policies:
            peaks.append(peak_alone(model, policy, budget, sink_ids))
            progress.add(1)
        for policy in policies:
            sides.append(full_side(model, policy, budget, sink_ids))
            progress.add(1)
        alternate(sides, Tokens(model, sink_ids), rounds, progress.add)
    rows = [
        LatencyRow(**vars(replace(side.policy.row(budget), budget=budget)), **times(side), peak_bytes=peak)
        for side, peak in zip(sides, peaks)
    ]
    by_name = {side.policy.name: side for side in sides}
    ratios = [
        Ratio(budget=budget, **ratio(by_name[above], by_name[below]))
        for above, below in RATIOS
        if above in by_name and below in by_name
    ]
    return rows, ratios


def along_stream(
    loaded: LoadedModel, policy: Policy, budget: int, length: int, points: int, tokens: int
) -> list[StreamRow]:
    """Time a policy's steps at several positions of one long stream; returns a row for each position.

    At each position the steps take turns with those of a new stream that has just filled its budget. The ratio in the
    row compares the two, so a stream at constant cost has ratios of 1. Tokens between the positions are not timed.

    Args:
        budget: cache slots of a KV head; the first position is this number of tokens.
        length: tokens of the whole stream; the last position is as near to its end as the timed steps allow.
        points: number of positions, evenly spaced; at least 2. `seen` in a row is the tokens fed before its steps.
        tokens: timed steps at each position, rounded up to whole blocks.
    """
    model, sink_ids = loaded.model, loaded.sink_ids
    rounds = -(-tokens // BLOCK)
    timed = rounds * (BLOCK + 1)  # tokens that the steps at one position feed
    old, ids = full_side(model, policy, budget, sink_ids), Tokens(model, sink_ids)
    rows, seen = [], budget
    with CountedProgress(f"stream {policy.label}", "tokens", length) as progress:
        progress.add(seen)
        for point in range(points):
            place = budget + point * (length - timed - budget) // (points - 1)
            while seen < place:
                count = min(PIECE, place - seen)
                old.stream.feed(ids.next(count))
                seen += count
                progress.add(count)
            old.blocks, new = [], full_side(model, policy, budget, sink_ids)
            alternate([old, new], ids, rounds, lambda _: None)
            seen += timed
            progress.add(timed)
            taken = {**times(old), **ratio(old, new, f"{place}/{budget}")}
            del new
            held = memory_now(model.device)
            rows.append(StreamRow(**vars(policy.row(budget)), seen=place, **taken, resident_bytes=held))
    return rows


def times(side: Side) -> dict[str, Any]:
    steps = side.steps
    return {"tokens": len(steps), "ms_per_token": median(steps), "ms_per_token_p99": quantile(steps, 0.99)}


def ratio(above: Side, below: Side, name: str | None = None) -> dict[str, Any]:
    """The fields of a ratio of two sides that took turns. Its name is that of their policies if none is given."""
    value, low, high = paired_ratio(above.medians, below.medians)
    name = name or f"{above.policy.name}/{below.policy.name}"
    return {"ratio": name, "value": value, "low": low, "high": high, "rounds": len(above.blocks)}


# ------------------------------------------------------------------------------------------------- how it is measured


@dataclass
class Side:
    policy: Policy
    stream: Stream
    blocks: list[list[float]] = field(default_factory=list)  # milliseconds of each timed step, round by round

    @property
    def block(self) -> int:
        return block_of(self.policy)

    @property
    def steps(self) -> list[float]:
        return [step for block in self.blocks for step in block]

    @property
    def medians(self) -> list[float]:
        return [median(block) for block in self.blocks]


def block_of(policy: Policy) -> int:
    """The number of timed steps of a policy in a round."""
    return 1 if isinstance(policy, Recompute) else BLOCK


class Tokens:
    """Token ids to feed: the model's sinks first, then random ids, drawn as needed."""

    def __init__(self, model: Any, sink_ids: Sequence[int]):
        self.sinks, self.device = list(sink_ids), model.device
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.generator = torch.Generator().manual_seed(0)

    def first(self, count: int) -> Tensor:
        sinks = torch.tensor([self.sinks], dtype=torch.long, device=self.device)
        return torch.cat([sinks, self.next(count)], dim=1)[:, :count]

    def next(self, count: int) -> Tensor:
        """Ids [1, count]."""
        return torch.randint(0, self.vocabulary, (1, count), generator=self.generator).to(self.device)


def full_side(model: Any, policy: Policy, budget: int, sink_ids: Sequence[int]) -> Side:
    """A new stream of a policy, filled so that its next query sees `budget` keys and eviction, if any, starts there."""
    stream = policy.stream(model)
    # A cache without a budget evicts nothing: its query sees the keys that are held and its own, so one less is fed.
    fed = budget - 1 if policy.budget is None else budget
    stream.feed(Tokens(model, sink_ids).first(fed))
    return Side(policy, stream)


def step(side: Side, id_B1: Tensor) -> float:
    """Milliseconds of one decoding step. A dense cache is cut back afterwards, so that every step sees C keys."""
    started = now(id_B1.device)
    side.stream.feed(id_B1)
    ended = now(id_B1.device)
    if isinstance(side.stream, CachedStream) and isinstance(side.stream.cache, DynamicCache):
        side.stream.cache.crop(-1)
    return 1000 * (ended - started)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def alternate(sides: list[Side], tokens: Tokens, rounds: int, on_step: Callable[[int], None]) -> None:
    """Add `rounds` blocks of timed steps to every side. Recompute, which is slow, comes first in each round, so that
    the blocks of all others are close together in time."""
    rng = random.Random(0)
    for _ in range(rounds):
        for side in sorted(rng.sample(sides, len(sides)), key=lambda side: side.block):
            if side.block > 1:
                step(side, tokens.next(1))
            side.blocks.append([step(side, tokens.next(1)) for _ in range(side.block)])
            on_step(side.block)


def peak_alone(model: Any, policy: Policy, budget: int, sink_ids: Sequence[int]) -> int:
    """Peak bytes over decoding steps of this policy, while no other stream exists."""
    side, tokens = full_side(model, policy, budget, sink_ids), Tokens(model, sink_ids)
    memory = PeakMemory(model.device)
    # The second step shows what the first leaves in memory. A step of recompute is a whole forward: one is enough.
    for _ in range(min(2, side.block)):
        step(side, tokens.next(1))
    return memory.peak()
