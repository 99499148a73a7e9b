"""Guards the policies: re-computation equals a fresh forward for every query, and rows say what a query saw."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from eval.measures import latency, texts
from eval.policies import recompute
from eval.policies.caches import Dense, Streaming
from eval.policies.choice import choose
from eval.policies.policy import end_of
from eval.policies.recompute import Recompute
from sinkmodel.errors import UserError
from sinkmodel.loading import LoadedModel
from sinkmodel.scoring import check_decoder
from tests.models import VOCABULARY, build, model_of, tokens
from tests.reference import streaming_nll as reference

BUDGET = 12
LENGTHS = (40, 5, 1, 29, 12, 13, 14)  # shorter than the budget, just as long, and longer
nothing = lambda _: None  # noqa: E731


@torch.no_grad()
def slow_recompute(model, ids: list[int], budget: int, sinks: int, stride: int = 1) -> torch.Tensor:
    """A fresh forward for every query: its window is found from the rule, none of its logits is shared with others."""
    nll = []
    for p in range(len(ids) - 1):
        if p < budget:
            seen = ids[: p + 1]
        else:
            last = min(p + stride - 1 - (p - budget) % stride, len(ids) - 2)  # the end of the window of query p
            seen = ids[:sinks] + ids[last + 1 - (budget - sinks) : p + 1]
        logits = model(torch.tensor([seen])).logits[0, -1]
        nll.append(-torch.log_softmax(logits, -1)[ids[p + 1]])
    return torch.stack(nll) if nll else torch.empty(0)


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("stride", [1, 4, 10])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_recompute_is_a_fresh_forward_for_every_query(family, stride, sinks, monkeypatch):
    """Guards the window's edges, its sinks, batches of windows of several documents, and a last window cut short."""
    monkeypatch.setattr(recompute, "TOKENS_AT_ONCE", 5 * BUDGET)  # windows of two documents meet in a batch
    model = model_of(family)
    documents = [tokens(length, seed=length) for length in LENGTHS]
    reported: list[int] = []
    results = Recompute(sinks, BUDGET, stride).score(model, documents, 20, reported.append)
    for ids, nll in zip(documents, results):
        assert nll.shape == (len(ids) - 1,)
        torch.testing.assert_close(nll, slow_recompute(model, ids, BUDGET, sinks, stride), atol=1e-4, rtol=0)
    assert sum(reported) == sum(len(ids) - 1 for ids in documents)


def test_a_window_a_stride_and_a_sink_more_are_other_results():
    """Guards the test above: it would notice any of them off by one. And a cached window is not re-computation."""
    model, ids = model_of("llama"), tokens(40)
    (nll,) = Recompute(2, BUDGET, 4).score(model, [ids], 20, nothing)
    for budget, sinks, stride in ((BUDGET + 1, 2, 4), (BUDGET - 1, 2, 4), (BUDGET, 1, 4), (BUDGET, 2, 3)):
        assert (nll - slow_recompute(model, ids, budget, sinks, stride)).abs().max() > 1e-2
    (plain,) = Recompute(0, BUDGET).score(model, [ids], 20, nothing)
    window = reference(model, ids, BUDGET, 0)
    torch.testing.assert_close(plain[:BUDGET], window[:BUDGET], atol=1e-4, rtol=0)
    assert (plain - window)[BUDGET:].abs().max() > 1e-2


@pytest.mark.parametrize("stride", [1, 4])
def test_the_head_sees_only_what_is_scored(stride):
    """Guards memory: no [windows, C, V] logits, no more logits at once than --chunk, none for nothing."""
    model, rows = build("llama"), []
    check_decoder(model, cached=False)
    model.lm_head.register_forward_hook(lambda _, args, out: rows.append(out.shape))
    length, chunk = BUDGET + 1 + 4 * stride, 8
    ids = tokens(length)
    Recompute(1, BUDGET, stride).score(model, [ids] * 3, chunk, nothing)
    before = 3 * -(-BUDGET // chunk)
    assert rows[:before] == [(1, 8, VOCABULARY), (1, 4, VOCABULARY)] * 3, "before the first overflow in chunks too"
    windows = rows[before:]
    assert windows
    for shape in windows:
        assert shape[1:] == (stride, VOCABULARY)
        assert shape[0] * stride <= chunk
    assert sum(shape[0] * shape[1] for shape in rows) == 3 * (length - 1)


def test_a_model_that_gives_all_logits_whatever_is_asked_for_is_scored(monkeypatch):
    """Guards xLSTM and others that take `logits_to_keep` and do not look at it."""
    model, ids = build("llama"), tokens(40)
    (expected,) = Recompute(1, BUDGET, 4).score(model, [ids], 5, nothing)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda logits_to_keep=0, **inputs: forward(**inputs))
    torch.testing.assert_close(Recompute(1, BUDGET, 4).score(model, [ids], 5, nothing)[0], expected)


def test_windows_go_through_the_model_together(monkeypatch):
    """Guards the speed: stride 1 is one forward for many windows, not one each."""
    model, calls = build("llama"), []
    check_decoder(model, cached=False)
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True)
    Recompute(0, BUDGET).score(model, [tokens(BUDGET + 1 + 60)], 30, nothing)
    assert calls[1:] == [(30, BUDGET), (30, BUDGET)]
    calls.clear()
    monkeypatch.setattr(recompute, "TOKENS_AT_ONCE", 7 * BUDGET)
    Recompute(0, BUDGET).score(model, [tokens(BUDGET + 1 + 14)], 30, nothing)
    assert calls[1:] == [(7, BUDGET), (7, BUDGET)]


@pytest.mark.parametrize("sinks", [0, 3])
def test_the_papers_convention_lets_a_query_see_one_key_more(sinks):
    """Guards DESIGN.md, "The budget includes the current token": the paper's C is C + 1 in ours, at the same S."""
    model, ids = model_of("llama"), tokens(40)
    policy = Streaming("sink-paper", sinks, BUDGET, "paper")
    (nll,) = policy.score(model, [ids], 7, nothing)
    torch.testing.assert_close(nll, reference(model, ids, BUDGET + 1, sinks), atol=1e-4, rtol=0)
    assert policy.keys_seen(39) == BUDGET + 1
    assert policy.keys_seen(5) == 5
    assert policy.window == BUDGET - sinks


def all_policies():
    rows = choose(["dense", "window", "window-paper", "recompute", "sink", "sink-paper"], [0, 3], BUDGET, front=2)
    return [*rows, Recompute(2, BUDGET, 4)]


def test_every_policy_answers_the_questions_of_the_interface():
    rows = [policy.row(39) for policy in all_policies()]
    assert [(row.label, row.keys_seen) for row in rows] == [
        ("dense", 39),
        ("window 0+12", 12),
        ("window-paper 0+12", 13),
        ("recompute 2+10", 12),
        ("sink 3+9", 12),
        ("sink-paper 3+9", 13),
        ("recompute 2+10, stride 4", 12),
    ]
    assert [row.keys_seen_least for row in rows[3::3]] == [12, 9]
    assert Recompute(0, BUDGET, 4).row(5).keys_seen_least == 5
    assert all(getattr(row, key) for row in rows for key in ("needs", "keeps", "positions"))


@pytest.mark.parametrize("index", range(len(all_policies())))
def test_a_stream_fed_step_by_step_says_what_score_says(index):
    """Guards that latency times the policy that ppl scores. A strided recompute streams as stride 1 does."""
    policy, model, ids = all_policies()[index], model_of("llama"), tokens(40)
    stream = policy.stream(model)
    logits = [stream.feed(torch.tensor([[token]]))[0] for token in ids[:-1]]
    nll = torch.stack([-torch.log_softmax(x, -1)[token] for x, token in zip(logits, ids[1:])])
    if isinstance(policy, Recompute):
        policy = dataclasses.replace(policy, stride=1)
    torch.testing.assert_close(nll, policy.score(model, [ids], 7, nothing)[0], atol=1e-4, rtol=0)
    long = policy.stream(model).feed(torch.tensor([ids[:-1]]))
    torch.testing.assert_close(long[0], logits[-1], atol=1e-4, rtol=0)


def test_a_model_whose_own_window_is_narrower_is_refused_by_name():
    """Guards "keys seen": the row would say C and the model would look at 8."""
    llama4 = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}
    for family, own in (("mistral", {"sliding_window": 8}), ("Llama4Text", {"attention_chunk_size": 8, **llama4})):
        model = build(family, **own)
        for policy in (Recompute(0, BUDGET), Dense()):
            with pytest.raises(UserError, match="'(mistral|llama4_text)' has its own window of 8"):
                policy.score(model, [tokens(40)], 7, nothing)


def test_a_model_with_a_state_is_read_again_and_an_encoder_is_not():
    """Guards a state that is lost at the edge of a chunk, and queries that see their answers, in streams too."""
    model, ids = build("Mamba", state_size=4, expand=1), tokens(40)
    (nll,) = Recompute(0, BUDGET).score(model, [ids], 5, nothing)
    torch.testing.assert_close(nll, slow_recompute(model, ids, BUDGET, 0), atol=1e-4, rtol=0)
    Recompute(0, BUDGET).stream(model).feed(torch.tensor([ids]))
    with pytest.raises(UserError, match="'mamba' does not continue"):
        Dense().stream(model)
    for start in (lambda p, m: p.stream(m), lambda p, m: p.score(m, [ids], 5, nothing)):
        for policy in (Recompute(0, BUDGET), Dense()):
            with pytest.raises(UserError, match="'bert' lets a token see"):
                start(policy, build("Bert"))


@pytest.mark.parametrize(
    ("family", "changes", "end"),
    [
        ("GPT2", {}, 64),
        ("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 48}, 64),
        ("Bert", {"is_decoder": True}, 64),
        ("gptj", {}, 64),
        ("mpt", {}, 64),
        ("llama-dynamic", {}, 63),
        ("llama", {}, None),
    ],
)
def test_dense_goes_as_far_as_the_model_has_positions_of_one_kind(family, changes, end, capsys):
    """Guards a note that rows show what happens beyond, and then a traceback; and a row that --chunk decides."""
    model = build(family, **changes)
    assert end_of(model) == end
    loaded = LoadedModel(model, None, [], "m")
    texts.check_positions(loaded, end or 64, [Dense()])
    assert capsys.readouterr().err == ""
    if end is None:
        texts.check_positions(loaded, 65, [Dense()])
        assert "dense reaches position 64, and m was made for 64 positions" in capsys.readouterr().err
        return
    (nll,) = Dense().score(model, [tokens(end + 1)], 16, nothing)
    assert nll.isfinite().all()
    remedy = "--tokens 65 stays" if loaded.positions == end else "texts shorter by 1"
    with pytest.raises(
        UserError, match=f"position {end}, and m keeps its rotary frequencies only up to {end}; .*{remedy}"
    ):
        texts.check_positions(loaded, end + 1, [Dense()], within="--tokens 65 stays within")
    latency._check_model(loaded, end)
    with pytest.raises(UserError, match=f"use --budgets {end} or less"):
        latency._check_model(loaded, end + 1)


def test_logits_that_are_not_finite_are_not_a_perplexity():
    model = build("llama")
    inner = model.model.norm
    inner.register_forward_hook(lambda _, args, out: out * float("nan") if out.shape[0] > 1 else out)
    with pytest.raises(UserError, match="not finite"):
        Recompute(0, BUDGET).score(model, [tokens(40)], 20, nothing)
