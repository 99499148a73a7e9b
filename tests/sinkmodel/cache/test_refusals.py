"""Guards: what cannot be streamed, or cannot be right, is one clear line before anything is written."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import transformers

from sinkmodel.cache import StreamingCache
from sinkmodel.errors import UserError
from tests.models import VOCABULARY, build, model_of, tokens
from tests.streams import fed, greedy_ids, held, stream_logits

BUDGET, SINKS = 12, 3


@pytest.fixture
def stream():
    """A model, a cache in mid-stream, and a check that a refusal has left the stream as it was."""
    model, ids = model_of("llama"), tokens(40)
    cache = StreamingCache(model.config, BUDGET, SINKS)
    fed(model, cache, ids[:30], 30)
    before, buffers = (list(cache.seen), cache.get_seq_length()), [x.clone() for x in held(cache)]
    yield model, cache
    assert (list(cache.seen), cache.get_seq_length()) == before
    assert all(torch.equal(x, kept) for x, kept in zip(held(cache), buffers, strict=True))
    logits = fed(model, cache, ids[30:], 1)
    torch.testing.assert_close(logits, stream_logits(model, ids, BUDGET, SINKS)[30:], atol=1e-4, rtol=0)


def refused(call, match: str = r"\w") -> str:
    with pytest.raises(UserError, match=match) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) > 30
    return message


def feed(model, cache, ids=((1, 2),), **more):
    with torch.no_grad():
        return model(torch.tensor(ids), past_key_values=cache, **more)


# -------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 4, "sinks": 4}, "budget"),
        ({"budget": 3, "sinks": 5}, "budget"),
        ({"budget": 0, "sinks": 0}, "budget"),
        ({"budget": -4, "sinks": 0}, "budget"),
        ({"budget": 8, "sinks": -1}, "sinks"),
        ({"budget": 8, "sinks": 1, "positions": "true"}, "positions"),
        ({"budget": 8, "sinks": 1, "convention": "exclusive"}, "convention"),
    ],
    ids=str,
)
def test_settings_that_make_no_stream(settings, message):
    refused(lambda: StreamingCache(model_of("llama").config, **settings), message)


def test_a_stream_without_sinks_is_allowed_but_said():
    with pytest.warns(UserWarning, match="sinks=0"):
        StreamingCache(model_of("llama").config, 8, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StreamingCache(model_of("llama").config, 8, 1)


# ---------------------------------------------------------------------------------------------- another model, batch


def test_a_cache_made_for_another_model():
    for family, changes in (
        ("llama", {"num_hidden_layers": 3}),
        ("gpt_neox", {}),
        ("llama", {"num_key_value_heads": 4}),
    ):
        cache = StreamingCache(build(family, **changes).config, BUDGET, SINKS)
        refused(lambda cache=cache: feed(model_of("llama"), cache))
        assert not held(cache)
        assert sum(cache.seen) == 0


def test_two_models_that_share_a_cache(stream):
    _, cache = stream
    refused(lambda: feed(build("llama"), cache), "model")


def test_a_cache_is_free_for_another_model_after_a_reset():
    first, second, ids = model_of("llama"), build("llama"), tokens(40)
    second.lm_head.weight.data.neg_()
    cache = StreamingCache(first.config, BUDGET, SINKS)
    fed(first, cache, tokens(20, seed=1), 20)
    cache.reset()
    logits = fed(second, cache, ids, 7)
    torch.testing.assert_close(logits, -stream_logits(first, ids, BUDGET, SINKS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("ids", [((1, 2), (3, 4)), ((1,), (2,), (3,))])
def test_a_batch_whose_size_changes(stream, ids):
    model, cache = stream
    assert str(len(ids)) in refused(lambda: feed(model, cache, ids), "row")


@pytest.mark.parametrize("bad", [VOCABULARY, 10**9, -1])
@pytest.mark.parametrize("length", [1, 2, 40])
def test_ids_outside_the_vocabulary(stream, bad, length):
    model, cache = stream
    assert str(bad) in refused(lambda: feed(model, cache, ((1,) * (length - 1) + (bad,),)))


def test_ids_outside_the_vocabulary_at_the_start():
    cache = StreamingCache(model_of("llama").config, BUDGET, SINKS)
    refused(lambda: feed(model_of("llama"), cache, ((1, VOCABULARY),)), str(VOCABULARY))
    assert cache.get_seq_length() == 0
    refused(lambda: model_of("llama").generate(torch.tensor([[1, 99]]), past_key_values=cache, max_new_tokens=2), "99")


# ------------------------------------------------------------------------------------------------- masks, attention


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"attention_mask": torch.zeros(1, 1, 2, 32)}, "mask"),
        ({"attention_mask": torch.ones(1, 1, dtype=torch.long)}, "mask"),
        ({"attention_mask": torch.ones(1, 33, dtype=torch.long)}, "mask"),
        ({"attention_mask": torch.ones(2, 32, dtype=torch.long)}, "mask"),
        ({"labels": torch.tensor([[1, 2]])}, "labels"),
        ({"output_attentions": True}, "output_attentions"),
        ({"use_cache": False}, "use_cache"),
    ],
    ids=["4-D mask", "short mask", "long mask", "mask of other rows", "labels", "attentions", "no cache"],
)
def test_requests_that_would_not_be_honoured(stream, request_, message):
    model, cache = stream
    refused(lambda: feed(model, cache, **request_), message)


@pytest.mark.parametrize("columns", [30, 10])
@pytest.mark.parametrize("length", [1, 2, 40])
def test_a_mask_that_hides_what_was_fed(stream, length, columns):
    """Guards turns that are masked as a DynamicCache would have it: what is in a slot is seen, whatever they say."""
    model, cache = stream
    mask = torch.ones(1, columns + length, dtype=torch.long)
    mask[0, 3:8] = 0
    refused(lambda: feed(model, cache, ((1,) * length,), attention_mask=mask), "hides 5 of the tokens that row 0")


def test_a_turn_that_hides_the_pads_of_a_row_that_ended_before_others():
    """Guards chats in a batch: `generate` feeds such pads unmasked, and they would be seen in silence ever after."""
    model, ids, pads = model_of("llama"), torch.tensor([tokens(9), tokens(9, seed=1)]), torch.tensor([[2], [0]])
    mask = torch.arange(9) >= pads
    cache = StreamingCache(model.config, BUDGET, SINKS)
    asked = {"past_key_values": cache, "do_sample": False, "max_new_tokens": 6, "eos_token_id": 0, "pad_token_id": 5}
    ends = [lambda ids, _: torch.tensor([True, False])]
    out = model.generate(ids, attention_mask=mask.long(), **asked, stopping_criteria=ends)
    assert out[0, 10:].tolist() == [5] * 5
    mask = torch.cat([mask, torch.tensor([[1] + [0] * 5, [1] * 6]), torch.ones(2, 3)], dim=1).long()
    full = torch.cat([out, torch.tensor([tokens(3)] * 2)], dim=1)
    seen = list(cache.seen)
    assert seen == [12, 14]
    refused(lambda: model.generate(full, attention_mask=mask, **asked), "hides 4 of the tokens that row 0")
    assert cache.seen == seen
    mask[:, 10:14] = 1
    model.generate(full, attention_mask=mask, **asked)
    assert cache.seen == [12 + 3 + 5, 14 + 1 + 3 + 5], "but those that were masked when they were fed may be hidden"


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("length", [3, 18, 29, 30])
def test_a_used_cache_and_a_prompt_without_anything_new(stream, length, with_mask):
    """Guards the next text of a list: transformers would feed the cache any part of its prompt, or nothing."""
    model, cache = stream
    ids = torch.tensor([tokens(length, seed=1)])
    prompts = [
        {"input_ids": ids},
        {"inputs_embeds": model.get_input_embeddings()(ids)},
        {"input_ids": ids.repeat(2, 1)},
    ]
    for prompt in prompts:
        mask = {"attention_mask": torch.ones(len(*prompt.values()), length)} if with_mask else {}
        call = functools.partial(model.generate, **prompt, **mask, past_key_values=cache, max_new_tokens=4)
        message = refused(call)
        assert f"already holds 30 tokens and the prompt has only {length}" in message
        assert "reset() on the cache to start from the beginning" in message


TAKING_BACK = {
    "assistant_model": lambda: model_of("llama"),
    "prompt_lookup_num_tokens": lambda: 3,
    "assistant_early_exit": lambda: 1,
}


@pytest.mark.parametrize("name", TAKING_BACK)
def test_generation_that_takes_tokens_back_is_refused_before_the_first_token_or_exact(name):
    """Guards a text that is lost in the middle, at the first rejected candidate after the first eviction."""
    model, ids = model_of("llama"), torch.tensor([tokens(6) * 2])
    settings = {"max_new_tokens": 20, "do_sample": False}
    plain = model.generate(ids, **settings)
    settings[name] = TAKING_BACK[name]()
    cache = StreamingCache(model.config, 31, SINKS)
    message = refused(
        lambda: model.generate(ids, past_key_values=cache, **settings), "assisted generation removes tokens"
    )
    assert "a budget of at least 32" in message
    assert cache.get_seq_length() == 0, "not one token was fed"
    cache = StreamingCache(model.config, 32, SINKS)
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), plain)


@pytest.mark.parametrize("family", ["gpt_neox", "gptj", "falcon", "stablelm", "mpt"])
def test_early_exit_is_broken_in_transformers_for_the_families_that_our_page_names(family):
    """Risk: sinkmodel/README.md warns of an error that is mended, or blames transformers for one of ours."""
    model = build(family)
    with pytest.raises(IndexError):
        model.generate(torch.tensor([tokens(6) * 2]), assistant_early_exit=1, max_new_tokens=9, do_sample=False)


def test_contrastive_search_is_refused_before_the_first_token():
    """It crops the cache at every step; transformers gets its code from the Hub, which calls `generate` in this way."""
    model, cache = model_of("llama"), StreamingCache(model_of("llama").config, 12, SINKS)

    def loop(model, input_ids, **kwargs):
        raise AssertionError("it began")

    settings = {"penalty_alpha": 0.6, "top_k": 4, "max_new_tokens": 20, "custom_generate": loop}
    refused(
        lambda: model.generate(torch.tensor([tokens(6)]), past_key_values=cache, **settings), "leave out penalty_alpha"
    )


def test_a_model_whose_config_turns_caching_off():
    """Guards MPT, whose published configs do: `generate` would feed the whole text again for every new token."""
    model = build("mpt", use_cache=False)
    cache = StreamingCache(model.config, BUDGET, SINKS)
    ids = torch.tensor([tokens(5)])
    refused(lambda: model.generate(ids, past_key_values=cache, max_new_tokens=9), "use_cache")
    assert cache.get_seq_length() == 0
    out = model.generate(ids, past_key_values=cache, max_new_tokens=9, use_cache=True, do_sample=False)
    assert out[0, 5:].tolist() == greedy_ids(model, tokens(5), BUDGET, SINKS, 9)
    assert cache.seen == [13]


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_that_would_not_see_the_mask(implementation):
    model = build("llama")
    model.config._attn_implementation = implementation
    cache = StreamingCache(model.config, BUDGET, SINKS)
    assert implementation in refused(lambda: feed(model, cache), "sdpa")
    assert not held(cache)


def test_a_forward_that_was_replaced_before_the_cache_was_made():
    """Guards `model.forward = torch.compile(model.forward)` before there is a cache: it would go past the cache."""
    model = build("llama")
    model.forward = functools.partial(transformers.LlamaForCausalLM.forward.__wrapped__, model)
    refused(lambda: feed(model, StreamingCache(model.config, BUDGET, SINKS)), "forward")


# ------------------------------------------------------------------------------------------------ refused by name


MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 1, "mamba_dt_rank": 2, "use_mamba_kernels": False}
JAMBA = {**MAMBA, "num_key_value_heads": 2, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
LINEAR = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 0,
    "layer_types": ["linear_attention", "full_attention"],
}
RECURRENT = {"num_key_value_heads": 1, "lru_width": 32, "block_types": ["recurrent", "attention"]}
SLIDING = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 48}, "opt"),
        ("GPT2", {"n_inner": 48}, "gpt2"),
        ("Bert", {"is_decoder": True}, "bert"),
        ("Bloom", {}, "bloom"),
        ("Falcon", {"alibi": True}, "falcon"),
        ("mistral", {"sliding_window": BUDGET - 1}, "mistral.*11"),
        ("Gemma2", SLIDING, "gemma2"),
        ("Cohere2", SLIDING, "cohere2"),
        ("Mamba", {"state_size": 4, "expand": 1}, "mamba"),
        ("Jamba", JAMBA, "jamba"),
        ("Qwen3Next", LINEAR, "qwen3_next"),
        (
            "RecurrentGemma",
            {"num_key_value_heads": 1, "lru_width": 32, "block_types": ["recurrent", "attention"]},
            "gemma",
        ),
        ("llama-dynamic", {"max_position_embeddings": BUDGET}, "llama.*11"),
        ("gptj", {"max_position_embeddings": BUDGET - 1}, "gptj.*11"),
        ("mpt", {"max_seq_len": BUDGET - 1}, "mpt.*11"),
    ],
)
def test_what_cannot_be_streamed_is_refused_by_name(family, changes, message):
    model = build(family, **changes)

    def start(one_by_one: bool):
        cache = StreamingCache(model.config, BUDGET, SINKS)
        for ids in ([1], [2]) if one_by_one else (tokens(30),):
            feed(model, cache, (ids,))

    for one_by_one in (True, False):
        refused(lambda one_by_one=one_by_one: start(one_by_one), f"(?i){message}")
    with torch.no_grad():
        assert model(torch.tensor([tokens(5)])).logits.isfinite().all(), "and the model is as it was"


def test_what_is_no_decoder_is_refused():
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=32, num_layers=1, num_heads=2)
    refused(lambda: StreamingCache(config, BUDGET, SINKS), "t5")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": BUDGET}),
        ("llama", {"max_position_embeddings": 4}),
        ("llama-linear", {"max_position_embeddings": 4}),
        ("llama-yarn", {"max_position_embeddings": 4}),
        ("llama-dynamic", {"max_position_embeddings": BUDGET + 1}),
        ("gptj", {"max_position_embeddings": BUDGET}),
        ("mpt", {"max_seq_len": BUDGET}),
    ],
)
def test_what_just_fits_is_not_refused(family, changes):
    """Guards the refusals: they begin at the model's limit, not before."""
    model, ids = build(family, **changes), tokens(40)
    logits = fed(model, StreamingCache(model.config, BUDGET, SINKS), ids, 1)
    torch.testing.assert_close(logits, stream_logits(model, ids, BUDGET, SINKS), atol=1e-4, rtol=0)
