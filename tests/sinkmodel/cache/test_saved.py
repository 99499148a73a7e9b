"""Guards: a stream is saved in flight and continues with the same bits, and a file from a stranger is only data."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from sinkmodel.cache import StreamingCache
from tests.models import build, model_of, tokens
from tests.sinkmodel.cache.test_cache import BUDGET, LENGTHS, SINKS, close, fed_batch, new, padded, truth
from tests.sinkmodel.cache.test_refusals import refused, stream
from tests.streams import fed, held

__all__ = ["stream"]  # a fixture


def by_state(cache, model, path):
    buffer = io.BytesIO()
    torch.save(cache.state_dict(), buffer)
    buffer.seek(0)
    other = new(model, cache.positions)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


def by_file(cache, model, path):
    cache.save(path)
    return StreamingCache.load(path, model.config)


def by_pickle(cache, model, path):
    return pickle.loads(pickle.dumps(cache))


def by_copy(cache, model, path):
    return copy.deepcopy(cache)


@pytest.mark.parametrize("positions", ["cache", "text"])
@pytest.mark.parametrize("saved_at", [0, 7, BUDGET, 35])
@pytest.mark.parametrize("way", [by_state, by_file, by_pickle, by_copy])
def test_a_saved_stream_goes_on_with_the_same_bits(way, saved_at, positions, tmp_path):
    model, ids, cache = model_of("gpt_neox"), tokens(60), new(model_of("gpt_neox"), positions)
    if saved_at:
        fed(model, cache, ids[:saved_at], 6)
    other = way(cache, model, tmp_path / "stream.pt")
    went_on = fed(model, cache, ids[saved_at:], 3, 17, 1)
    assert torch.equal(fed(model, other, ids[saved_at:], 3, 17, 1), went_on)
    close(went_on, truth(model, ids, positions)[saved_at:])
    assert other.seen == cache.seen == [60]
    assert (other.budget, other.sinks, other.positions) == (BUDGET, SINKS, positions)


def test_a_saved_stream_shares_nothing_with_the_one_that_goes_on():
    model, ids, cache = model_of("llama"), tokens(60), new(model_of("llama"))
    fed(model, cache, ids[:30], 30)
    state = cache.state_dict()
    fed(model, cache, tokens(30, seed=4), 30)
    cache.reset()
    fed(model, cache, tokens(30, seed=6), 30)
    other = new(model)
    other.load_state_dict(state)
    cache.reset()
    fed(model, cache, tokens(30, seed=5), 30)
    close(fed(model, other, ids[30:], 1), truth(model, ids)[30:])


@pytest.mark.parametrize("way", [by_state, by_file, by_pickle])
def test_a_ragged_batch_is_saved_and_goes_on(way, tmp_path):
    model, rows = model_of("llama"), [tokens(length + 21, seed=length) for length in LENGTHS]
    ids, mask = padded(rows)
    cache = new(model)
    fed_batch(model, cache, ids[:, :30], [30], mask)
    cache = way(cache, model, tmp_path / "stream.pt")
    with torch.no_grad():
        batch = model(ids[:, 30:], past_key_values=cache, attention_mask=mask).logits
    for row, logits in zip(rows, batch):
        close(logits, truth(model, row)[-21:])


def test_the_format_is_the_one_that_older_versions_wrote():
    """Risk: a stream that a user has on disk is not read any more, since a key has another name or meaning."""
    model, cache = model_of("llama"), new(model_of("llama"))
    ids, mask = padded([tokens(30), tokens(20, seed=1)])
    fed_batch(model, cache, ids, [29, 1], mask)
    state = cache.state_dict()
    assert state.pop("format") == "sinkmodel-stream-1"
    assert list(state.pop("settings")) == ["model", "budget", "sinks", "positions", "convention"]
    shapes = state.pop("shapes")
    for name, slots in (("keys", BUDGET), ("values", BUDGET), ("sink_keys", SINKS)):
        assert list(state.pop(name).shape) == shapes[name] == [2, 2, 2, slots, 8]
    assert len(state.pop("sample")) == 16
    origin = state.pop("origin")
    assert len(origin) == 2
    turned = [seen - start - BUDGET for seen, start in zip([30, 20], origin)]
    assert state == {"columns": 30, "padded_until": 10, "torn": False, "seen": [30, 20], "turned": turned}


# ---------------------------------------------------------------------------------------------------- what is no stream


def test_a_file_that_is_no_saved_stream(stream, tmp_path):
    model, cache = stream
    path = tmp_path / "stream.pt"
    cache.save(path)
    whole = path.read_bytes()
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, content in (
        ("cut", whole[: len(whole) // 2]),
        ("short", whole[:10]),
        ("empty", b""),
        ("text", b"hello " * 9),
    ):
        (tmp_path / f"{name}.pt").write_bytes(content)
    for name in ("cut", "short", "empty", "text", "foreign", "list", "missing"):
        message = refused(lambda name=name: StreamingCache.load(tmp_path / f"{name}.pt", model.config))
        assert f"{name}.pt" in message
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_file_that_runs_code_is_not_run(tmp_path):
    """Guards strangers' files: a pickle that calls something is refused, and nothing is called."""

    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"keys": Bomb()}, tmp_path / "bomb.pt")
    refused(lambda: StreamingCache.load(tmp_path / "bomb.pt", model_of("llama").config))
    assert not (tmp_path / "ran").exists()


def test_a_stream_of_another_model_is_not_loaded(stream, tmp_path):
    _, cache = stream
    cache.save(tmp_path / "stream.pt")
    for other in ("gpt_neox", "llama-linear", "mistral"):
        refused(lambda other=other: StreamingCache.load(tmp_path / "stream.pt", model_of(other).config))
    deeper = build("llama", num_hidden_layers=3)
    refused(lambda: StreamingCache.load(tmp_path / "stream.pt", deeper.config))


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": BUDGET + 1},
        {"sinks": SINKS - 1},
        {"positions": "text"},
        {"convention": "paper"},
        {"budget": BUDGET + 1, "sinks": SINKS + 1},
    ],
    ids=str,
)
def test_a_state_of_another_configuration_is_not_loaded(stream, settings):
    model, cache = stream
    other = StreamingCache(model.config, **{"budget": BUDGET, "sinks": SINKS, **settings})
    refused(lambda: other.load_state_dict(cache.state_dict()), next(iter(settings)))
    assert not held(other)


def test_a_state_that_was_tampered_with_is_not_loaded(stream):
    """Guards the stream that takes the state: it is as before, whatever is missing or has the wrong shape or type."""
    model, cache = stream
    good = StreamingCache(model.config, BUDGET, SINKS)
    fed(model, good, tokens(30, seed=3), 30)
    state = good.state_dict()
    for name, value in state.items():
        bad = [{k: v for k, v in state.items() if k != name}, {**state, name: "nonsense"}]
        bad += [{**state, name: value[..., :-1]}] if isinstance(value, torch.Tensor) else []
        bad += [{**state, name: [*value, *value]}] if isinstance(value, list) else []
        for wrong in bad:
            refused(lambda wrong=wrong: cache.load_state_dict(wrong))
    refused(lambda: cache.load_state_dict({}))
