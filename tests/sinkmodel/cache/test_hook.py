"""Guards: the hook hands over to caches that ask for it, leaves all others alone, and goes without a trace."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from transformers import DynamicCache

from sinkmodel.cache import StreamingCache
from sinkmodel.cache.hook import WRAPPERS, install_hook, uninstall_hook
from sinkmodel.errors import UserError
from tests.models import build, model_of, tokens
from tests.streams import fed, stream_logits

BUDGET, SINKS = 12, 3


@pytest.fixture
def unhooked():
    """A model whose class has no hook before and after the test."""
    model = build("olmo")
    uninstall_hook(model)
    yield model
    uninstall_hook(model)


def methods(model_class) -> dict[str, object]:
    return {name: vars(model_class).get(name) for name in WRAPPERS}


class Recorder(DynamicCache):
    """Any cache with the four members, which knows nothing of a StreamingCache."""

    in_forward = False

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def run_forward(self, forward, model, args, kwargs):
        self.calls.append(("forward", len(args)))
        self.in_forward = True
        try:
            return forward(model, *args, **kwargs)
        finally:
            self.in_forward = False

    def check_new_tokens(self, new):
        self.calls.append(("new", new))

    def check_generation(self, mode, prompt, most):
        self.calls.append((mode, prompt, most))


def test_any_cache_with_the_four_members_is_handed_the_forward(unhooked):
    """Risk: the hook knows more of a StreamingCache than it says, and no other cache can use it."""
    install_hook(unhooked.config)
    ids = torch.tensor([tokens(7), tokens(7, seed=1)])
    plain = unhooked.generate(ids, do_sample=False, max_new_tokens=4)
    cache = Recorder()
    assert torch.equal(unhooked.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=4), plain)
    assert cache.calls[0] == ("greedy_search", 7, 10)
    assert [call for call in cache.calls if call[0] == "forward"] == [("forward", 0)] * 4
    with torch.no_grad():
        unhooked(ids, None, None, cache := Recorder())  # past_key_values is the fourth argument
    assert cache.calls == [("forward", 4)]


@pytest.mark.parametrize("times", [1, 3])
def test_the_class_gets_its_own_methods_back(unhooked, times):
    """Risk: a wrapper stays, or a method that was inherited is from then on the class's own."""
    model_class, before = type(unhooked), methods(type(unhooked))
    assert before["forward"] is not None
    assert before["prepare_inputs_for_generation"] is None
    for _ in range(times):
        install_hook(unhooked)
    hooked = methods(model_class)
    assert not set(hooked.values()) & set(before.values())
    install_hook(unhooked.config)
    assert methods(model_class) == hooked, "a second hook within the first"
    for _ in range(times):
        uninstall_hook(unhooked.config)
    assert methods(model_class) == before
    assert "_prepare_cache_for_generation" not in vars(model_class)


def test_a_stream_whose_hook_is_gone_is_refused_and_can_go_on_with_another(unhooked):
    """Risk: forwards without the hook go past the cache in silence, with the wrong positions."""
    ids, cache = tokens(40), StreamingCache(unhooked.config, BUDGET, SINKS)
    truth = stream_logits(unhooked, ids, BUDGET, SINKS)
    torch.testing.assert_close(fed(unhooked, cache, ids[:20], 20), truth[:20], atol=1e-4, rtol=0)
    uninstall_hook(unhooked)
    for call in (
        lambda: fed(unhooked, cache, ids[20:], 1),
        lambda: unhooked.generate(torch.tensor([ids]), past_key_values=cache, max_new_tokens=2),
    ):
        with pytest.raises(UserError, match="did not see this forward.*install_hook"):
            call()
    assert cache.seen == [20]
    install_hook(unhooked)
    torch.testing.assert_close(fed(unhooked, cache, ids[20:], 1), truth[20:], atol=1e-4, rtol=0)


def test_a_subclass_is_without_a_hook_when_its_base_had_one(unhooked):
    """Risk: a class of one's own calls the hooked forward of its base after its hook was taken off."""

    class Mine(type(unhooked)):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
            return super().forward(input_ids, attention_mask, position_ids, past_key_values, **kwargs)

    before = methods(type(unhooked)), methods(Mine)
    mine = Mine(unhooked.config).eval()
    install_hook(unhooked)
    install_hook(mine)
    cache = Recorder()
    mine.generate(torch.tensor([tokens(5)]), past_key_values=cache, do_sample=False, max_new_tokens=1)
    assert [call[0] for call in cache.calls] == ["greedy_search", "new", "forward"], "each once"
    uninstall_hook(mine)
    assert (methods(type(unhooked)), methods(Mine)) == before


def test_a_wrapper_around_the_hook_is_not_thrown_away(unhooked, monkeypatch):
    """Risk: what another library did to the class after us is undone, or the hook stays under it in silence."""
    before = methods(type(unhooked))
    install_hook(unhooked)
    hooked, calls = methods(type(unhooked)), []

    @functools.wraps(hooked["forward"])
    def theirs(*args, **kwargs):
        calls.append(1)
        return hooked["forward"](*args, **kwargs)

    class Mine(type(unhooked)):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(type(unhooked), "forward", theirs)
        install_hook(unhooked)
        with pytest.raises(UserError, match="OlmoForCausalLM.forward was replaced"):
            uninstall_hook(unhooked)
        assert methods(type(unhooked)) == hooked | {"forward": theirs}
        mine, ids = Mine(unhooked.config).eval(), tokens(30)
        mine.load_state_dict(unhooked.state_dict())
        logits = fed(mine, StreamingCache(mine, BUDGET, SINKS), ids, 30)
        assert calls, "the hook of a subclass goes past it"
        torch.testing.assert_close(logits, stream_logits(unhooked, ids, BUDGET, SINKS), atol=1e-4, rtol=0)
        patch.setattr(type(unhooked), "forward", before["forward"])  # somebody took the hook off without us
        uninstall_hook(mine)
    setattr(type(unhooked), "forward", before["forward"])  # noqa: B010  monkeypatch has put the wrapper back
    assert methods(type(unhooked)) == before


def test_other_caches_see_nothing_of_the_hook(unhooked):
    """Risk: a model that was streamed once computes differently without a stream."""
    ids = torch.tensor([tokens(9)])
    asked = {"do_sample": False, "max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    before = unhooked.generate(ids, past_key_values=DynamicCache(), **asked)
    install_hook(unhooked)
    after = unhooked.generate(ids, past_key_values=DynamicCache(), **asked)
    assert all(torch.equal(x, y) for x, y in zip(before.logits, after.logits, strict=True))


@pytest.mark.parametrize("given", [transformers.T5Config(), model_of("llama").model], ids=["encoder", "no logits"])
def test_what_gives_no_logits_has_no_hook(given):
    with pytest.raises(UserError, match="no causal language model for a T5Config|LlamaModel gives no logits"):
        install_hook(given)
