"""Guards: chunked scoring equals a stream fed token by token, at its edges too, and refuses what it cannot do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AttentionInterface

from sinkmodel import band, scoring
from sinkmodel.errors import UserError
from sinkmodel.scoring import check_decoder, dense_nll, streaming_nll
from tests.models import FAMILIES, build, model_of, tokens
from tests.reference import streaming_nll as reference
from tests.streams import stream_logits

LENGTH, BUDGET = 60, 16
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
LLAMA4 = {**GROUPED, "attention_chunk_size": BUDGET, "num_local_experts": 2, "intermediate_size_mlp": 48}
MAMBA = {"state_size": 4, "expand": 1}


@pytest.mark.parametrize("sinks", [0, 1, 4, BUDGET - 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_stream_fed_token_by_token(family, sinks):
    model, ids = model_of(family), tokens(LENGTH)
    (nll,) = streaming_nll(model, [ids], BUDGET, sinks, chunk=7)
    assert nll.shape == (LENGTH - 1,)
    torch.testing.assert_close(nll, reference(model, ids, BUDGET, sinks), atol=1e-4, rtol=0)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("family", ["cohere", "smollm3", "llama-dynamic", "gemma", "phi", "olmo", "stablelm"])
def test_equals_a_stream_in_every_rotary_layout(family, sinks):
    """Guards interleaved pairs, layers without positions, and frequencies that hold up to a length only."""
    model, ids = build(family), tokens(LENGTH)
    log_p = stream_logits(model, ids, BUDGET, sinks).log_softmax(-1)
    expected = -log_p[torch.arange(LENGTH - 1), torch.tensor(ids[1:])]
    for chunk in (7, 256):
        torch.testing.assert_close(*streaming_nll(model, [ids], BUDGET, sinks, chunk), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_one_key_more_or_less_is_another_result(family):
    """Guards the test above: it would notice a mask, a distance or a sink count that is off by one."""
    model, ids = model_of(family), tokens(LENGTH)
    (nll,) = streaming_nll(model, [ids], BUDGET, 2)
    for budget, sinks in ((BUDGET - 1, 2), (BUDGET + 1, 2), (BUDGET, 1), (BUDGET, 3), (BUDGET + 1, 3)):
        other = reference(model, ids, budget, sinks)
        assert (nll - other)[BUDGET + 1 :].abs().max() > 1e-2, (budget, sinks)
    exact = reference(model, ids, BUDGET, 2)
    assert torch.equal(exact[:BUDGET], reference(model, ids, LENGTH, 0)[:BUDGET]), "nothing is lost before p = C"
    assert (exact - reference(model, ids, LENGTH, 0))[BUDGET].abs() > 1e-3, "the query at p = C has lost a key"


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_is_the_model_itself(family):
    model, ids = model_of(family), tokens(LENGTH)
    with torch.no_grad():
        expected = -torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
    expected = expected[torch.arange(LENGTH - 1), torch.tensor(ids[1:])]
    for nll in (*dense_nll(model, [ids], chunk=9), *streaming_nll(model, [ids], LENGTH, 3, chunk=9)):
        torch.testing.assert_close(nll, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [1, 2, 5, BUDGET, 59, 500])
@pytest.mark.parametrize("sinks", [0, 3])
def test_the_chunk_changes_the_speed_alone(chunk, sinks):
    model, ids = model_of("llama"), tokens(LENGTH)
    (nll,) = streaming_nll(model, [ids], BUDGET, sinks, chunk=chunk)
    (usual,) = streaming_nll(model, [ids], BUDGET, sinks, chunk=11)
    torch.testing.assert_close(nll, usual, atol=1e-4, rtol=0)


@pytest.mark.parametrize("block", [1, 3, BUDGET, 21])
@pytest.mark.parametrize("sinks", [0, 3, BUDGET - 1])
@pytest.mark.parametrize("family", ["gpt_neox", "qwen3"])
def test_blocks_of_queries_change_the_speed_alone(family, sinks, block, monkeypatch):
    """Guards sinks written over keys that are still wanted, and a bias kept for a block that it does not fit."""
    monkeypatch.setattr(band, "BLOCK", block)
    model, documents = model_of(family), [tokens(90), tokens(70, seed=1)]
    for ids, nll in zip(documents, streaming_nll(model, documents, BUDGET, sinks, chunk=23)):
        torch.testing.assert_close(nll, reference(model, ids, BUDGET, sinks), atol=1e-4, rtol=0)


@pytest.mark.parametrize("score", [lambda m, d: streaming_nll(m, d, BUDGET, 2, chunk=8), dense_nll])
def test_documents_of_a_batch_do_not_touch_each_other(score, monkeypatch):
    """Guards right padding, rows that end early, batches cut by ROWS_AT_ONCE, and the order of the results."""
    monkeypatch.setattr(scoring, "ROWS_AT_ONCE", 24)  # three rows of a chunk of 8
    model = model_of("gpt_neox")
    documents = [tokens(length, seed=length) for length in (20, 60, 1, 37, 60, 3, 41)]
    reported = []
    batch = score(model, documents)
    for ids, nll in zip(documents, batch):
        assert nll.shape == (len(ids) - 1,)
        if len(ids) > 1:
            torch.testing.assert_close(nll, score(model, [ids])[0], atol=1e-4, rtol=0)
    streaming_nll(model, documents, BUDGET, 2, chunk=8, on_chunk=reported.append)
    assert sum(reported) == sum(len(ids) - 1 for ids in documents)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "llama-yarn"])
@pytest.mark.parametrize("sinks", [0, 3, 12])
def test_moving_the_origin_changes_nothing(family, sinks, monkeypatch):
    """Guards endless streams: positions stay small, no key is turned twice, and the numbers stay."""
    turns, largest = {}, []
    original = band.BandLayer.turn

    def counted(layer, rotary, rotation):
        for j in range(layer.first, layer.seen):
            turns[id(layer), j] = turns.get((id(layer), j), 0) + 1
        original(layer, rotary, rotation)

    monkeypatch.setattr(band.BandLayer, "turn", counted)
    model, ids = build(family), tokens(150)
    inner = model.gpt_neox if family == "gpt_neox" else model.model
    inner.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: largest.append(int(kwargs.get("position_ids", args[-1]).max())), with_kwargs=True
    )
    (nll,) = streaming_nll(model, [ids], BUDGET, sinks, chunk=4)
    torch.testing.assert_close(nll, reference(model, ids, BUDGET, sinks), atol=1e-4, rtol=0)
    assert len(turns) > 10 or BUDGET - sinks < 5
    assert set(turns.values()) == {1}
    assert max(largest) < 50 < len(ids)


def test_bf16_stays_at_one_rounding_however_long_the_stream():
    """Guards drift: what bf16 adds is the same at the end of the stream as at its start, rebased often or not."""
    ids = tokens(400)
    exact = build("llama", initializer_range=0.1).bfloat16().float()
    (truth,) = streaming_nll(exact, [ids], BUDGET, 2, chunk=8)
    for chunk in (8, 400):
        half = build("llama", initializer_range=0.1).bfloat16()
        (nll,) = streaming_nll(half, [ids], BUDGET, 2, chunk)
        error = (nll - truth).abs()
        assert error[200:].mean() < 1.5 * error[BUDGET:100].mean() + 1e-3
        assert error.mean() < 0.03


def test_two_threads_do_not_disturb_each_other():
    models, ids = [build("gpt_neox"), build("llama")], tokens(LENGTH)
    alone = [streaming_nll(model, [ids], BUDGET, 1, chunk=3)[0] for model in models]
    with ThreadPoolExecutor(2) as pool:
        together = pool.map(lambda model: streaming_nll(model, [ids] * 5, BUDGET, 1, chunk=3), models)
    for results, expected in zip(together, alone):
        for nll in results:
            torch.testing.assert_close(nll, expected)


def test_the_model_is_left_as_it_was():
    model, ids = build("llama"), tokens(LENGTH)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        streaming_nll(model, [ids], BUDGET, 1)
        assert model.config._attn_implementation == implementation
    with pytest.raises(RuntimeError, match="stop"):
        streaming_nll(model, [ids], BUDGET, 1, chunk=8, on_chunk=lambda _: (_ for _ in ()).throw(RuntimeError("stop")))
    assert model.config._attn_implementation == "eager"
    assert dense_nll(model, [ids])[0].isfinite().all()


# ---------------------------------------------------------------------------------------------------- fails closed


@pytest.mark.parametrize(("budget", "sinks"), [(4, 4), (0, 0), (3, 5)])
def test_a_budget_that_holds_no_window_is_refused(budget, sinks):
    with pytest.raises(UserError, match="make it at least"):
        streaming_nll(model_of("llama"), [tokens(LENGTH)], budget, sinks)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 48}, "'opt' adds absolute positions"),
        ("Falcon", {"alibi": False}, "'falcon' does not send its attention"),
        ("Gemma2", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64}, "'gemma2' asks .* softcap"),
        ("mistral", {"sliding_window": BUDGET - 1}, "'mistral' has its own window of 15"),
        ("Llama4Text", LLAMA4, "'llama4_text' has chunked_attention layers"),
        ("Mamba", MAMBA, "'mamba' has .* layers"),
        (
            "llama",
            {
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                "max_position_embeddings": 15,
            },
            "'llama' keeps its rotary frequencies only up to 14",
        ),
    ],
)
def test_what_cannot_be_streamed_is_refused_by_name(family, changes, message):
    model = build(family, **changes)
    before = model.config._attn_implementation
    with pytest.raises(UserError, match=message):
        streaming_nll(model, [tokens(LENGTH)], BUDGET, 1)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    "request_",
    [{"s_aux": torch.zeros(4)}, {"attention_mask": torch.zeros(1)}, {"dropout": 0.1}, {"sliding_window": 15}],
)
def test_a_request_that_would_not_be_honoured_is_refused(request_, monkeypatch):
    model = build("llama")

    def asking(module, query, key, value, attention_mask, **kwargs):
        return band._attention(module, query, key, value, **{"attention_mask": None, **kwargs, **request_})

    monkeypatch.setattr(band, "ATTENTION", "asking")
    AttentionInterface.register("asking", asking)
    with pytest.raises(UserError, match=f"asks its attention for {next(iter(request_))}"):
        streaming_nll(model, [tokens(LENGTH)], BUDGET, 1)


def test_a_layer_that_goes_its_own_way_is_noticed(monkeypatch):
    model = build("llama")
    layer = model.model.layers[1].self_attn
    layer.config = type(layer.config)(**layer.config.to_dict())
    layer.config._attn_implementation = "eager"
    with pytest.raises(UserError, match=r"'llama' does not send .* \(1 of 2 layers did\)"):
        streaming_nll(model, [tokens(LENGTH)], BUDGET, 0, chunk=8)


def test_logits_that_are_not_finite_are_not_a_perplexity():
    model = build("llama")
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        streaming_nll(model, [tokens(LENGTH)], BUDGET, 1)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Bert", {}, "'bert' lets a token see those that follow it"),
        ("Mamba", MAMBA, r"'mamba' does not continue .* \(it forgets what came before\); .* recompute"),
        ("Lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}, "'lfm2' does not continue"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_scores_decoders_with_keys_alone(family, changes, message, dtype):
    """Guards a perplexity of a model that sees the answer, or that has forgotten the text at the edge of a chunk."""
    model = build(family, **changes).to(dtype)
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(UserError, match=message):
            dense_nll(model, [tokens(LENGTH)], chunk=9)


@pytest.mark.parametrize("family", ["mpt", "GPT2", "Bert", "Mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_decoders_are_not_refused_and_tried_once(family, dtype):
    """Guards learned positions, ALiBi, BERT as a decoder and half precision from the refusals above; and the speed."""
    changes = {"Bert": {"is_decoder": True}, "Mixtral": {"num_local_experts": 4, "num_key_value_heads": 2}}
    model, forwards = build(family, **changes.get(family, {})).to(dtype), []
    check_decoder(model, cached=True)
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    dense_nll(model, [tokens(LENGTH)], chunk=30)
    assert len(forwards) == 2


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_rounding_is_no_difference_and_another_context_is(dtype, rounding):
    """Guards big models in half precision: noise, an offset common to all words, one token with another expert."""
    logits, noise = torch.randn(2, 4, 2, 1000, generator=torch.Generator().manual_seed(0))
    same = logits + rounding * noise
    same[0, 0] = noise[0, 0]
    assert not scoring._apart((same + 10).to(dtype), logits.to(dtype))
    assert scoring._apart((logits + 0.3 * noise).to(dtype), logits.to(dtype))


@pytest.mark.parametrize("score", [lambda *words, **more: streaming_nll(*words, BUDGET, 1, **more), dense_nll])
def test_what_would_give_numbers_that_mean_nothing_is_refused(score):
    """Risk: memory that nobody wrote, or losses under dropout, come back as results."""
    model = build("llama")
    for documents, more, message in (
        ([[1, 2, 3]], {"chunk": -1}, "chunk is -1"),
        ([[1, 2, 3]], {"chunk": 0}, "chunk is 0"),
        ([[1, 2], [1.5, 2.0, 3.0]], {}, "give whole numbers"),
        ([[1, 2, 10**6]], {}, "has the id 1000000, and the model has ids 0 to"),
        ([[1, -2, 3]], {}, "has the id -2"),
    ):
        with pytest.raises(UserError, match=message):
            score(model, documents, **more)
    assert [len(nll) for nll in score(model, [[], [1], [1, 2]])] == [0, 0, 1]
    with pytest.raises(UserError, match="in training mode"):
        score(model.train(), [[1, 2, 3]])
