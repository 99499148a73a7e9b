"""Times reading a prompt and the steps after it; all sides take turns, so that a disturbance affects all of them.

In every round the sides read the prompt in a new random order. Each uses a new cache, which is freed before the next
side reads. One round before these warms up. Then all sides take steps in turns, at each of a few places of an answer:
in every round one step that is not timed, and a block of timed steps, which are then undone. Ratios compare times of
the same round.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from eval.measures.meters import PeakMemory, memory_now
from eval.measures.prefill.crossover import Times, crossover, crossover_interval
from eval.measures.statistics import paired_ratio, share
from eval.measures.timing import BLOCK, Tokens, now
from sinkmodel.cache.sizes import bytes_of
from sinkmodel.errors import UserError
from sinkmodel.loading import LoadedModel
from sinkmodel.products import fast_products
from sinkmodel.progress import CountedProgress
from sinkmodel.results.latency import AnswerTimes, Crossover, PrefillRow

PIECE = 256  # tokens of an answer that are fed together on the way to the next timed place


@dataclass
class Side:
    """A memory at a budget, and its measurements, one entry per round."""

    memory: str
    budget: int | None  # None for dense, and for namm and its controls
    make: Callable[[], Any]  # returns an empty cache
    first: list[float] = field(default_factory=list)  # ms to the first token
    above: list[int] = field(default_factory=list)  # peak bytes while reading the prompt, minus those before
    grown: list[int] = field(default_factory=list)  # bytes that the process held after reading, minus those before
    steps: dict[int, list[float]] = field(default_factory=dict)  # by place: ms of a step, medians of blocks
    sizes: tuple[int, int] = (0, 0)  # bytes held and bytes kept after the prompt (`sizes_of`)

    @property
    def label(self) -> str:
        return self.memory if self.budget is None else f"{self.memory} {self.budget}"

    @property
    def times(self) -> Times:
        return Times(self.first, self.steps)


def dense_side() -> Side:
    """The baseline: transformers' own cache."""
    return Side("dense", None, DynamicCache)


@torch.inference_mode()
def measure(
    loaded: LoadedModel, sides: Sequence[Side], length: int, answers: Sequence[int], rounds: int, label: str
) -> tuple[list[PrefillRow], list[Crossover]]:
    """The rows and the crossovers at one prompt length.

    Args:
        sides: the first one is dense, the denominator of all ratios.
        length: tokens of the prompt, without the model's sinks.
        answers: lengths of answers in tokens; steps are timed at these places.
        rounds: in each round every side reads the prompt once; it takes one block of steps per round at each place.
    """
    tokens = Tokens(loaded.model, loaded.sink_ids)
    prompt = tokens.first(len(loaded.sink_ids) + length)
    gc.freeze()  # existing objects are skipped by the garbage collections of `memory_now`
    try:
        with CountedProgress(label, "prompts", (rounds + 1) * len(sides)) as progress:
            base, caches = _read_in_turns(loaded.model, sides, prompt, rounds, progress)
        with CountedProgress(f"{label}, answers", "blocks", len(answers) * rounds * len(sides)) as progress:
            _answer_in_turns(loaded.model, sides, caches, tokens, answers, rounds, progress)
    finally:
        gc.unfreeze()
    return [row(length, side, sides[0], answers, base) for side in sides], crossovers(length, sides)


# ----------------------------------------------------------------------------------------------------- the prompt


def _read_in_turns(
    model: Any, sides: Sequence[Side], prompt: Tensor, rounds: int, progress: CountedProgress
) -> tuple[int, dict[str, Any]]:
    """Read the prompt with every side; returns the process's bytes before that, and the caches of the last round."""
    for side in sides:
        _warm_up(model, side, prompt)
        progress.add(1)
    base, rng, caches = memory_now(prompt.device), random.Random(0), {}
    for number in range(rounds):
        for side in rng.sample(sides, len(sides)):
            cache = read(model, side, prompt)
            if number == rounds - 1:
                caches[side.label] = cache
            del cache
            progress.add(1)
    return base, caches


def _warm_up(model: Any, side: Side, prompt: Tensor) -> None:
    try:
        read(model, side, prompt)
    except torch.OutOfMemoryError:
        raise UserError(
            f"{side.label}: a prompt of {prompt.shape[1]} tokens does not fit into the memory of {prompt.device}; use "
            "a shorter --length, or leave it out of --memories"
        ) from None
    except UserError as error:
        raise UserError(f"{side.label}: {error}") from None
    side.first, side.above, side.grown = [], [], []


def read(model: Any, side: Side, prompt: Tensor) -> Any:
    """Read the prompt and return the cache; the time and the memory are added to the side."""
    cache = side.make()
    if hasattr(cache, "expect"):
        cache.expect(prompt.shape[1])
    memory = PeakMemory(prompt.device)
    started = now(prompt.device)
    with fast_products():  # our own caches use it, so all sides must
        model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    side.first.append(1000 * (now(prompt.device) - started))
    side.above.append(memory.peak() - memory.before)
    side.grown.append(memory_now(prompt.device) - memory.before)
    side.sizes = sizes_of(cache)
    return cache


def sizes_of(cache: Any) -> tuple[int, int]:
    """All bytes that the cache holds, and the bytes of its kept keys and values."""
    if isinstance(cache, DynamicCache):
        held = bytes_of(x for layer in cache.layers for x in (layer.keys, layer.values))
        return held, held
    return cache.bytes_held, cache.bytes_kept


# ----------------------------------------------------------------------------------------------------- the answer


def _answer_in_turns(
    model: Any,
    sides: Sequence[Side],
    caches: dict[str, Any],
    tokens: Tokens,
    answers: Sequence[int],
    rounds: int,
    progress: CountedProgress,
) -> None:
    """Add `rounds` step times to every side at each place, in ascending order of places."""
    rng, done = random.Random(0), 1  # tokens of the answer; the first came with the prompt and has not been fed
    for place in sorted(answers):
        for side in sides:
            _feed(model, caches[side.label], tokens.next(place - done))
        done = place
        for _ in range(rounds):
            for side in rng.sample(sides, len(sides)):
                side.steps.setdefault(place, []).append(block(model, caches[side.label], tokens))
                progress.add(1)


def block(model: Any, cache: Any, tokens: Tokens) -> float:
    """The median time of a block of steps in ms; the cache is unchanged afterwards.

    The steps are cropped off again. If the cache cannot be cropped, since steps evict other keys, a copy takes them.
    """
    crops = isinstance(cache, DynamicCache) or cache.is_croppable
    cache = cache if crops else cache.fork()
    took = []
    for _ in range(BLOCK + 1):
        ids = tokens.next(1)
        started = now(ids.device)
        _feed(model, cache, ids)
        took.append(1000 * (now(ids.device) - started))
    if crops:
        cache.crop(-(BLOCK + 1))
    return median(took[1:])


def _feed(model: Any, cache: Any, ids: Tensor) -> None:
    for piece in ids.split(PIECE, dim=1) if ids.numel() else ():
        model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)


# ----------------------------------------------------------------------------------------------------- the numbers


def row(length: int, side: Side, dense: Side, answers: Sequence[int], base: int) -> PrefillRow:
    """The result row of a side; `base` is the process's memory in bytes with only the model loaded."""
    above = int(median(side.above))
    return PrefillRow(
        length=length,
        memory=side.memory,
        budget=side.budget,
        label=side.label,
        rounds=len(side.first),
        ttft_ms=median(side.first),
        **against("ttft", side.first, dense.first, side is dense),
        peak_bytes=base + above,
        reading_bytes=above,
        bytes_held=side.sizes[0],
        bytes_kept=side.sizes[1],
        kept_share=share(side.sizes[1], dense.sizes[1]),
        bytes_grown=int(median(side.grown)),
        answers=[_answer_row(side, dense, answer) for answer in answers],
    )


def _answer_row(side: Side, dense: Side, answer: int) -> AnswerTimes:
    totals = side.times.totals(answer)
    return AnswerTimes(
        answer=answer,
        step_ms=median(side.steps[answer]),
        **against("step", side.steps[answer], dense.steps[answer], side is dense),
        total_ms=median(totals),
        **against("total", totals, dense.times.totals(answer), side is dense),
    )


def against(name: str, ours: Sequence[float], of_dense: Sequence[float], is_dense: bool) -> dict[str, Any]:
    """The ratio to dense, paired by round, with its interval."""
    value, low, high = (None, None, None) if is_dense else paired_ratio(list(ours), list(of_dense))
    return {f"{name}_ratio": value, f"{name}_low": low, f"{name}_high": high}


def crossovers(length: int, sides: Sequence[Side]) -> list[Crossover]:
    """When one side overtakes the other: each memory against dense, and GemFilter against others of its budget."""
    dense, *memories = sides
    gemfilters = [side for side in memories if side.memory == "gemfilter"]
    pairs = [(side, dense) for side in memories]
    pairs += [(gem, side) for gem in gemfilters for side in memories if side is not gem and side.budget == gem.budget]
    return [_crossover(length, *pair) for pair in pairs]


def _crossover(length: int, one: Side, other: Side) -> Crossover:
    first, second = sorted((one, other), key=lambda side: median(side.first))
    value = crossover(first.times.medians(), second.times.medians())
    low, high = crossover_interval(first.times, second.times) or (None, None)
    return Crossover(
        length=length,
        first=first.label,
        second=second.label,
        crossover=_finite(value),
        low=_finite(low),
        high=_finite(high),
        rounds=len(first.first),
    )


def _finite(value: float | None) -> float | None:
    """None for infinity, which JSON cannot express; None means never."""
    return None if value is None or math.isinf(value) else value
