"""Guards `watch`: what it shows is what the model computes, for every sink, and what it cannot show it refuses."""

from __future__ import annotations

import logging

import pytest
import torch

from sinkmodel.architectures import attentions_of
from sinkmodel.attention_maps import Seen, watch
from sinkmodel.errors import UserError
from sinkmodel.sinks import IN_SOFTMAX
from tests.models import build, model_of, tokens

T = 20
IDS = torch.tensor([tokens(T, seed=1), tokens(T, seed=2)])
OSS = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}


def layers_of(model, ids_BT=IDS, **forward):
    seen: list[Seen] = []
    output = watch(model, ids_BT, seen.append, **forward)
    return seen, output


@torch.no_grad()
def eager(model, ids_BT=IDS):
    """transformers' own maps, written out by its own code."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    output = model.base_model(input_ids=ids_BT, use_cache=True, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation(before)
    return output


@pytest.mark.parametrize("family", ["gpt_neox", "gpt_neox-serial", "llama", "llama-yarn", "qwen3", "mistral"])
def test_the_maps_are_those_of_transformers_own_eager_attention(family):
    model = model_of(family)
    seen, output = layers_of(model, output_hidden_states=True)
    theirs = eager(model)
    assert [layer.layer for layer in seen] == [0, 1]
    for layer in seen:
        torch.testing.assert_close(layer.weights_BHTT, theirs.attentions[layer.layer], atol=1e-5, rtol=0)
        cached = theirs.past_key_values.layers[layer.layer]
        torch.testing.assert_close(layer.key_BGTD, cached.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.value_BGTD, cached.values, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.score_BHTT.softmax(-1), layer.weights_BHTT)
        assert layer.sink_BHT is layer.sink_score_BHT is None
        assert layer.weights_BHTT.max(-1).values.mean() > 0.2, "far from uniform, else this proves little"
    for ours, other in zip(output.hidden_states, theirs.hidden_states):
        torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", IN_SOFTMAX)
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
def test_a_sink_in_the_softmax_takes_its_share_and_the_output_is_the_models_own(architecture, kind):
    model = model_of(f"{architecture}-{kind}")
    seen, output = layers_of(model)
    with torch.no_grad():
        own = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
    torch.testing.assert_close(output.last_hidden_state, own, atol=1e-4, rtol=1e-4)
    for layer, module in zip(seen, attentions_of(model)):
        if kind == "zero":
            score_BHT = torch.zeros(2, 4, T)
        elif kind == "logit":
            score_BHT = module.sink[None, :, None].expand(2, 4, T)
        else:
            key_HD = module.sink.repeat_interleave(4 // len(module.sink), dim=0)
            score_BHT = torch.einsum("bhtd,hd->bht", layer.query_BHTD, key_HD) / 8**0.5
        exps = layer.score_BHTT.exp()
        torch.testing.assert_close(layer.sink_score_BHT, score_BHT, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.sink_BHT, score_BHT.exp() / (score_BHT.exp() + exps.sum(-1)))
        torch.testing.assert_close(layer.sink_BHT + layer.weights_BHTT.sum(-1), torch.ones(2, 4, T))
        assert layer.sink_BHT.std() > 0.01


def test_the_sinks_of_gpt_oss_are_a_sink_in_the_softmax():
    model = build("GptOss", **OSS)
    for layer in model.base_model.layers:
        layer.self_attn.sinks.data += torch.tensor([0.0, 1.0, 2.0, -2.0])
    seen, _ = layers_of(model)
    for layer, theirs_BHTT in zip(seen, eager(model).attentions):
        torch.testing.assert_close(layer.weights_BHTT, theirs_BHTT, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.sink_BHT, 1 - theirs_BHTT.sum(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("falcon", {}, r"'falcon' does not send its attention .* \(0 of 2 did\)"),
        ("falcon-new", {}, "'falcon' does not send"),
        ("Bloom", {"n_head": 4, "n_layer": 2}, "'bloom' does not send"),
        ("mpt", {}, "'mpt' does not send"),
        ("gptj", {}, "'gptj' does not send"),
        ("Gemma2", {"num_key_value_heads": 2, "head_dim": 8}, "'gemma2' asks its attention for softcap"),
        ("Bert", {}, "'bert' asks its attention for keys after the query"),
        ("mistral", {"sliding_window": T - 1}, f"its own sliding window of {T - 1}, narrower than rows of {T}"),
    ],
)
def test_a_model_that_cannot_be_watched_is_refused_by_name(family, settings, message):
    """Risk: maps that are not what the model computes, or pages of advice from transformers around our one line."""
    model = build(family, **settings)
    before = model.config._attn_implementation
    advice: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = advice.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        with pytest.raises(UserError, match=message):
            layers_of(model)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not advice
    assert model.config._attn_implementation == before


def test_the_window_of_a_model_may_be_as_wide_as_the_rows():
    assert len(layers_of(build("mistral", sliding_window=T))[0]) == 2


def test_a_compiled_body_is_watched_without_compiling_anew_and_is_as_it_was_afterwards():
    """Risk: a training run that waits for the compiler at its first log line, or a graph that is another afterwards."""
    graphs: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, inputs):
        graphs.append(graph)
        return graph.forward

    model = build("llama")
    with torch.no_grad():
        model.base_model.compile(backend=look)
        before = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
        compiled = len(graphs)
        seen, _ = layers_of(model)
        after = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
    assert len(graphs) == compiled > 0
    assert torch.equal(before, after)
    plain, _ = layers_of(build("llama"))
    assert torch.equal(seen[1].weights_BHTT, plain[1].weights_BHTT)


def test_the_model_is_as_it_was_when_the_visitor_fails():
    model = build("llama")

    def fail(seen: Seen) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(model, IDS, fail)
    assert model.config._attn_implementation == "sdpa"
    model(input_ids=IDS)


def test_half_precision_is_watched_in_fp32():
    seen, _ = layers_of(build("llama").to(torch.bfloat16))
    assert {x.dtype for x in (seen[0].weights_BHTT, seen[0].key_BGTD, seen[0].score_BHTT)} == {torch.float32}
    torch.testing.assert_close(seen[0].weights_BHTT.sum(-1), torch.ones(2, 4, T))
