"""Guards what would go wrong in silence: a stream that continues although it should stop, or with another model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from sinkmodel import StreamingCache, UserError
from sinkmodel.cache.state import State
from sinkmodel.rope import Rotary
from tests.models import build, tokens
from tests.reference import streaming_logits
from tests.streams import fed, stream_logits

BUDGET, SINKS = 12, 3


def close(logits, expected) -> None:
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("piece", [1, 3])
@pytest.mark.parametrize(
    ("where", "held"),
    [
        *(("commit", 1), ("commit", 10), ("commit", 20), ("_remember_sinks", 1), ("_move_origin", 24)),
        *(("_turn_sinks", 10), ("_turn_sinks", 24), ("update", 1), ("update", 10), ("update", 20)),
        *(("begin", 1), ("begin", 10), ("begin", 20), ("begin", 24)),
    ],
)
def test_an_interrupt_anywhere_is_harmless_or_said(where, held, piece, late, monkeypatch):
    """Ctrl-C before or after each part of a forward: what follows is right, or refused."""
    model, ids = build("llama"), tokens(60)
    original = getattr(State, where)
    cache = StreamingCache(model.config, BUDGET, SINKS)
    fed(model, cache, ids[:held], held)

    def interrupted(*args):
        if late:
            original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(State, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        fed(model, cache, ids[held:], piece, 1)
    monkeypatch.setattr(State, where, original)
    done = cache.get_seq_length()
    if cache.torn:
        with pytest.raises(UserError, match="interrupted"):
            fed(model, cache, ids[done:], 1)
    else:
        close(fed(model, cache, ids[done:], 1), stream_logits(model, ids, BUDGET, SINKS)[done:])


def test_an_interrupt_between_two_layers_that_are_turned_is_said(monkeypatch):
    """Half of the layers count from one token, half from another: such a stream must not continue."""
    model, cache = build("llama"), StreamingCache(build("llama").config, BUDGET, SINKS)
    fed(model, cache, tokens(24), 24)
    original, calls = Rotary.turned_pairs, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(Rotary, "turned_pairs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fed(model, cache, [1], 1)
    monkeypatch.setattr(Rotary, "turned_pairs", original)
    with pytest.raises(UserError, match="interrupted"):
        fed(model, cache, [1], 1)


@pytest.mark.parametrize("piece", [1, 3])
def test_a_copy_that_is_made_within_a_forward_is_not_in_one(piece):
    """Risk: a copy takes its forwards for parts of another one, and lets them past unchecked."""
    model, ids, copies = build("llama"), tokens(60), []
    cache = StreamingCache(model.config, BUDGET, SINKS)
    fed(model, cache, ids[:30], 30)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(cache)))
    fed(model, cache, ids[30 : 30 + piece], piece)
    hook.remove()
    assert cache.seen == [30 + piece]
    assert copies[0].seen == [30]
    assert not copies[0].in_forward
    if copies[0].torn:
        with pytest.raises(UserError, match="interrupted"):
            fed(model, copies[0], ids[30:], 1)
    else:
        close(fed(model, copies[0], ids[30:], 1), stream_logits(model, ids, BUDGET, SINKS)[30:])


def test_no_gradient_rather_than_a_wrong_one():
    model = build("llama").requires_grad_(True)
    with torch.enable_grad():
        logits = model(input_ids=torch.tensor([tokens(30)]), past_key_values=StreamingCache(model.config, 12, 3)).logits
    assert not logits.requires_grad


@pytest.mark.parametrize("carry", ["state_dict", "pickle", "deepcopy"])
def test_a_twin_does_not_go_on_with_the_stream_of_the_other(carry):
    """Twins have one config; their weights tell them apart."""
    model, twin, ids = build("llama"), build("llama"), tokens(40)
    twin.get_input_embeddings().weight.data += 0.01
    cache = StreamingCache(model.config, BUDGET, SINKS)
    fed(model, cache, ids[:30], 30)
    if carry == "state_dict":
        other = StreamingCache(twin.config, BUDGET, SINKS)
        other.load_state_dict(cache.state_dict())
    else:
        other = pickle.loads(pickle.dumps(cache)) if carry == "pickle" else copy.deepcopy(cache)
    with pytest.raises(UserError, match="other weights"):
        fed(twin, other, ids[30:], 1)
    close(fed(model, other, ids[30:], 1), fed(model, cache, ids[30:], 1))


def test_a_model_that_was_changed_after_a_stream_is_tried_again():
    model, ids = build("llama"), tokens(50)
    fed(model, StreamingCache(model.config, BUDGET, SINKS), ids, 50)
    model.model.rotary_emb.inv_freq.mul_(1.7)
    logits = fed(model, StreamingCache(model.config, BUDGET, SINKS), ids, 1)
    close(logits[:-1], streaming_logits(model, ids, BUDGET, SINKS))
    model.resize_token_embeddings(70)
    fed(model, StreamingCache(model.config, BUDGET, SINKS), [65], 1)


def test_dropout_switched_on_in_mid_stream():
    model = build("llama")
    cache = StreamingCache(model.config, BUDGET, SINKS)
    fed(model, cache, tokens(20), 20)
    model.train()
    with pytest.raises(UserError, match="training mode"):
        fed(model, cache, [1], 1)


def test_a_wrapper_within_a_wrapper_feeds_once():
    """A subclass and its base are both wrapped, and the one calls the other."""

    class Mine(type(build("llama"))):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
            return super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)

    model, ids = build("llama"), tokens(40)
    StreamingCache(model.config, BUDGET, SINKS)
    mine = Mine(model.config).eval()
    mine.load_state_dict(model.state_dict())
    cache = StreamingCache(mine, BUDGET, SINKS)
    close(fed(mine, cache, ids, 7), stream_logits(model, ids, BUDGET, SINKS))
    assert cache.seen == [40]


def test_a_subclass_that_filters_what_it_is_given_is_refused():
    class Mine(type(build("llama"))):
        def forward(self, input_ids=None, **kwargs):
            return super().forward(input_ids=input_ids, **kwargs)

    mine = Mine(build("llama").config).eval()
    with pytest.raises(UserError, match="Mine has no argument attention_mask, past_key_values, position_ids"):
        fed(mine, StreamingCache(mine, BUDGET, SINKS), [1, 2], 1)


def test_generate_that_drops_the_cache_is_noticed():
    """Phi-3 with longrope starts from the beginning at its original length, without the cache that it was given."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 12}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    model = build("Phi3", num_key_value_heads=2, original_max_position_embeddings=12, rope_parameters=rope)
    cache = StreamingCache(model.config, BUDGET, SINKS)
    with pytest.raises(UserError, match="Phi3ForCausalLM drops the cache"):
        model.generate(torch.tensor([tokens(5)]), past_key_values=cache, max_new_tokens=20, do_sample=False)


def test_inputs_with_something_for_each_token_are_cut_into_the_same_pieces():
    model, ids = build("gptj"), tokens(40)
    kinds = torch.tensor([tokens(40, seed=1)])
    one, many = (StreamingCache(model.config, BUDGET, SINKS) for _ in range(2))
    with torch.no_grad():
        whole = model(torch.tensor([ids]), token_type_ids=kinds, past_key_values=one).logits[0]
        steps = [model(torch.tensor([[x]]), token_type_ids=kinds[:, i : i + 1], past_key_values=many).logits[0]
                 for i, x in enumerate(ids)]  # fmt: skip
    close(whole, torch.cat(steps))


def test_a_first_forward_that_failed_settles_nothing(monkeypatch):
    model = build("llama")
    cache = StreamingCache(model.config, BUDGET, SINKS)
    update = StreamingCache.update
    monkeypatch.setattr(StreamingCache, "update", lambda *_: (_ for _ in ()).throw(RuntimeError("no room")))
    with pytest.raises(RuntimeError, match="no room"):
        fed(model, cache, [1, 2], 2)
    monkeypatch.setattr(StreamingCache, "update", update)
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2], [3, 4], [5, 6]]), past_key_values=cache).logits
    assert logits.shape[0] == 3
    assert cache.seen == [2, 2, 2]
