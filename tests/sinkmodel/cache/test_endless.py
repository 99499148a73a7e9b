"""Guards: a stream has no end. Precision, positions, memory and the compiled step stay what they were at its start."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sinkmodel.cache import StreamingCache
from tests.models import STREAMED, build, cast, model_of, tokens
from tests.streams import NO_ROTATION, Stream, fed, held, stream_logits
from tests.test_streams import masked

BUDGET, SINKS = 16, 2
PLACES = [(family, "cache") for family in STREAMED] + [(f, "text") for f in STREAMED if f not in NO_ROTATION]


def close(logits, expected) -> None:
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def leap_far(cache) -> int:
    """As if millions of tokens had been fed; a multiple of the window, so that the ring's next slot is the same."""
    leap = 4_000_000 // cache.window * cache.window
    state = cache.state
    state.seen, state.origin = [n + leap for n in state.seen], [n + leap for n in state.origin]
    return leap


# ------------------------------------------------------------------------------------------------ length, positions


@pytest.mark.parametrize(("family", "positions"), PLACES)
def test_after_four_million_positions(family, positions):
    model, ids = model_of(family), tokens(90)
    cache, stream = StreamingCache(model.config, BUDGET, SINKS, positions), Stream(model, BUDGET, SINKS, positions)
    close(fed(model, cache, ids[:40], 7), torch.stack([stream.feed(token) for token in ids[:40]]))
    leap = leap_far(cache)
    stream.skip(leap)
    logits = torch.cat([fed(model, cache, ids[40:70], 1), fed(model, cache, ids[70:], 20)])
    close(logits, torch.stack([stream.feed(token) for token in ids[40:]]))
    assert cache.seen == [leap + 90]


@pytest.mark.parametrize(
    ("family", "sizes"),
    [(family, (64,)) for family in STREAMED] + [("llama", (1,)), ("llama", (7, 1, 500)), ("mpt", (1,))],
    ids=str,
)
def test_after_thousands_of_tokens(family, sizes):
    """The first tokens and the last hundred say all: nothing else is still seen, by any layer, at the end."""
    model, ids = model_of(family), tokens(2000)
    logits = fed(model, StreamingCache(model.config, BUDGET, SINKS), ids, *sizes)
    for end in (1000, 2000):
        ends = [*ids[:SINKS], *ids[end - 100 : end]]
        assert len(ends) - 20 > SINKS + model.config.num_hidden_layers * BUDGET
        close(logits[end - 20 : end], stream_logits(model, ends, BUDGET, SINKS)[-20:])


@pytest.mark.parametrize("positions", ["cache", "text"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_model_computes_with_small_positions(family, positions):
    """Guards fp32 angles: they are worth 1e-4 in the logits up to some thousands, and no further."""
    model, largest = build(family), []
    model.base_model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: largest.append(int(kwargs.get("position_ids", args[-1]).max())), with_kwargs=True
    )
    cache = StreamingCache(model.config, BUDGET, SINKS, positions)
    fed(model, cache, tokens(5000), 64)
    leap_far(cache)
    fed(model, cache, tokens(5000), 64)
    fed(model, cache, tokens(100), 1)
    assert len(largest) > 200
    assert 0 < max(largest) < 2500


# -------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("family", "dtype", "positions"),
    [
        ("llama", torch.bfloat16, "cache"),
        ("llama", torch.bfloat16, "text"),
        ("llama", torch.float16, "cache"),
        ("gpt_neox-serial", torch.bfloat16, "cache"),
    ],
    ids=str,
)
def test_half_precision_does_not_drift(family, dtype, positions):
    """Guards keys that are turned again and again, as SinkCache's were: 28 % wrong after 252 steps.

    Two roundings a step, from and to a random angle, make the error here 1.5 times as large as it must be.
    """
    ids, budget = tokens(600), 128
    half, model = cast(build(family), dtype), cast(cast(build(family), dtype), torch.float32)
    truth = stream_logits(model, ids, budget, SINKS, positions)
    anew = stream_logits(half, ids, budget, SINKS, positions)  # turned from its raw form at every step
    error = (fed(half, StreamingCache(half.config, budget, SINKS, positions), ids, 1).float() - truth).abs()
    usual = (anew.float() - truth).abs()
    assert error[budget:].mean() < 1.2 * usual[budget:].mean()
    assert error[400:].mean() < 1.25 * error[budget:350].mean()
    assert error.mean() > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", list(STREAMED))
def test_half_precision_in_every_family(family, dtype):
    ids, half = tokens(60), cast(build(family), dtype)
    model = cast(cast(build(family), dtype), torch.float32)
    truth = stream_logits(model, ids, BUDGET, SINKS)
    usual = (stream_logits(half, ids, BUDGET, SINKS).float() - truth).abs()
    for sizes in ([1], [60]):
        cache = StreamingCache(half.config, BUDGET, SINKS)
        error = (fed(half, cache, ids, *sizes).float() - truth).abs()
        assert error.mean() < 1.5 * usual.mean()
        assert {x.dtype for x in held(cache)} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt_neox-serial", "cohere"])
def test_keys_turn_with_the_frequencies_that_the_model_has(family, dtype):
    """Guards `model.to(bfloat16)`, which rounds the frequencies too: the cache must not use those of the config."""
    model, ids = build(family).to(dtype).float(), tokens(200)
    exact = cast(cast(build(family), dtype), torch.float32)  # the same weights
    logits = fed(model, StreamingCache(model.config, BUDGET, SINKS, "text"), ids, 1)
    close(logits, masked(model, ids, BUDGET, SINKS))
    assert (logits - masked(exact, ids, BUDGET, SINKS))[100:].abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------ memory, mechanism


@pytest.mark.parametrize("convention", ["inclusive", "paper"])
@pytest.mark.parametrize("family", ["llama", "falcon", "falcon-new", "mpt"])
def test_memory_is_the_slots_and_never_moves(family, convention):
    """Guards growth and copies: S + W slots a layer and head, at the same place through many windows."""
    model, config = model_of(family), model_of(family).config
    cache = StreamingCache(config, BUDGET, SINKS, convention=convention)
    assert cache.slots == BUDGET + (convention == "paper")
    assert cache.window == BUDGET - SINKS
    fed(model, cache, tokens(1), 1)
    heads = {"llama": 2, "falcon": 1, "falcon-new": 4, "mpt": 4}[family]
    buffers, places = held(cache), [x.data_ptr() for x in held(cache)]
    assert len(buffers) == 2 * config.num_hidden_layers
    for x in buffers:
        assert x.shape == (1, heads, cache.slots, config.hidden_size // config.num_attention_heads)
    total = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in buffers}.values())
    assert total == sum(x.numel() * x.element_size() for x in buffers)
    for sizes in ([1], [40], [7, 1, 33]):
        fed(model, cache, tokens(3 * BUDGET), *sizes)
        assert [x.data_ptr() for x in held(cache)] == places


def test_nothing_else_grows_with_the_stream():
    """Guards masks, ids and positions kept for good: after the fill not one tensor element more is alive."""
    model, cache = model_of("llama"), StreamingCache(model_of("llama").config, BUDGET, SINKS)

    def alive() -> int:
        gc.collect()
        return sum(x.numel() for x in gc.get_objects() if type(x) is torch.Tensor)

    fed(model, cache, tokens(1000), 1)
    before = alive()
    fed(model, cache, tokens(1000), 1)
    assert alive() == before


class Watch(TorchDispatchMode):
    """Which operators make a tensor of `size` elements or more, and which read or write one in place."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.made, self.touched = size, [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        known = {x.untyped_storage().data_ptr() for x in given}
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.numel() >= self.size]
        self.made += [name for x in results if x.untyped_storage().data_ptr() not in known]
        mutates = function._schema.is_mutable
        view = any(r.alias_info is not None for r in function._schema.returns) and not mutates
        if not view and any(x.numel() >= self.size for x in [*given, *results]):
            self.touched.add(name)
        return out


def watched(family: str, positions: str, steps: int) -> Watch:
    """A few steps on a full cache whose window is longer than any weight matrix has elements."""
    model = build(family)
    cache = StreamingCache(model.config, 4096, 4, positions)
    assert max(x.numel() for x in model.parameters()) < cache.window
    fed(model, cache, tokens(4200), 2100)
    with Watch(cache.window) as watch:
        fed(model, cache, tokens(steps), 1)
    return watch


@pytest.mark.parametrize(("family", "positions"), [("gpt_neox", "cache"), ("llama", "text")])
def test_a_step_on_a_full_cache_copies_nothing_of_its_size(family, positions):
    """Guards the cost of a step: no cat, no new tensor of W elements, no turning of the window's keys."""
    watch = watched(family, positions, steps=8)
    assert not watch.made
    attention = {name for name in watch.touched if "scaled_dot_product" in name}
    assert attention, "the watch sees what attention reads"
    assert watch.touched - attention <= {"index_copy_", "index_put_"}, "one slot is written, and no more"


# ---------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("prompt", [0, 5, 990])
@pytest.mark.parametrize(
    ("family", "backend", "positions"),
    [("llama", "eager", "cache"), ("llama", "aot_eager", "text"), ("gpt_neox", "aot_eager", "cache")],
)
def test_the_compiled_step_is_compiled_once(family, backend, positions, prompt):
    """Guards guards: a counter that is a Python number, or a shape that grows, compiles the model at every token."""
    torch._dynamo.reset()
    model, ids = build(family), tokens(prompt + 100)
    eager = fed(model, StreamingCache(model.config, BUDGET, SINKS, positions), ids, prompt or 1, 1)
    compiled, cache = torch.compile(model, backend=backend), StreamingCache(model.config, BUDGET, SINKS, positions)
    start = [fed(model, cache, ids[:prompt], prompt)] if prompt else []
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    start.append(fed(compiled, cache, ids[prompt : prompt + 3], 1))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == before + 1, "the whole model is one graph"
    with torch._dynamo.config.patch(error_on_recompile=True):
        went_on = fed(compiled, cache, ids[prompt + 3 :], 1)  # past the fill, six windows, and (from 990) a new origin
        leap_far(cache)
        fed(compiled, cache, ids[:30], 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    close(torch.cat([*start, went_on]), eager)


def test_a_compiled_step_compiles_nothing_beside_the_model():
    """Risk: torch.compile tries a function of ours, gives up on it, or tries it again at each step (a millisecond)."""
    torch._dynamo.reset()
    model = build("llama")
    compiled, cache = torch.compile(model, backend="eager"), StreamingCache(model.config, BUDGET, SINKS)
    fed(compiled, cache, tokens(40), 1)
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["total"] == frames["ok"] > 0
    before = dict(frames)
    fed(compiled, cache, tokens(40), 1)
    assert dict(frames) == before
