"""Guards: the reference that the memories are held to is itself right."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, DynamicCache

from tests.models import IN_SOFTMAX, model_of, tokens
from tests.reference import streaming_logits
from tests.sinkmodel.memories import scores
from tests.sinkmodel.memories.reference import DEFAULTS, keep, run

PROMPT, CONTINUATION = tokens(24, seed=1), tokens(6, seed=2)
N, M = len(PROMPT), len(CONTINUATION)
FAMILIES = ["llama", "llama-yarn", "gpt_neox", "qwen2", "qwen3", "mistral", "gemma", "phi", "smollm3"]


def by_norm(keys, values):
    return -keys.norm(dim=-1) * values.norm(dim=-1)


METHODS = {
    "snapkv": {"budget": 12, "window": 3, "kernel": 3, "pooling": "avg"},
    "h2o": {"budget": 12, "window": 4, "sinks": 1},
    "tova": {"budget": 12, "interval": 2},
    "expected_attention": {"budget": 12, "n_future_positions": 8},
    "scored": {"budget": 12, "score": by_norm, "window": 2},
    "gemfilter": {"budget": 12, "layer": 1},
}


def double(model):
    return copy.deepcopy(model).double()


@torch.no_grad()
def dense(model, ids: list[int]) -> torch.Tensor:
    return double(model)(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("family", FAMILIES + list(IN_SOFTMAX))
@pytest.mark.parametrize("positions", ["text", "cache"])
def test_nothing_evicted_is_the_dense_model(family, positions):
    """Guards: attention, rotation, scaling and the order of heads are the model's own in each family."""
    model = model_of(family)
    wanted = dense(model, PROMPT + CONTINUATION)
    error = 1e-6 if family.endswith("kv_bias") else 1e-9  # `sinkmodel` computes its score in fp32
    for method, settings in METHODS.items():
        outcome = run(model, method, {**settings, "budget": N + M, "positions": positions}, PROMPT, CONTINUATION)
        assert outcome.kept_at_end[0][0] == list(range(N + M))
        torch.testing.assert_close(outcome.prompt_logits, wanted[N - 1], rtol=0, atol=error)
        torch.testing.assert_close(outcome.logits, wanted[N:], rtol=0, atol=error)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "gemfilter"])
def test_a_query_reads_the_kept_keys_and_no_other(family, method):
    """Guards: an evicted key is never read again, and each KV head reads its own set (transformers' cache, cut)."""
    model, cache = model_of(family), DynamicCache()
    plain = double(model)
    whole = run(model, method, METHODS[method], PROMPT, CONTINUATION)
    plain(torch.tensor([PROMPT]), past_key_values=cache)
    held = [[list(range(N)) for _ in heads] for heads in whole.kept_at_end]
    for t, token in enumerate(CONTINUATION):
        kept = run(model, method, METHODS[method], PROMPT, CONTINUATION[:t]).kept_at_end
        for layer, old, new in zip(cache.layers, held, kept):
            assert all(set(b) <= set(a) for a, b in zip(old, new))
            places = torch.tensor([[a.index(p) for p in b] for a, b in zip(old, new)])
            index = places[None, :, :, None].expand(-1, -1, -1, layer.keys.shape[-1])
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
        here = torch.tensor([[N + t]])
        logits = plain(torch.tensor([[token]]), past_key_values=cache, position_ids=here).logits[0, 0]
        torch.testing.assert_close(whole.logits[t], logits, rtol=0, atol=1e-9)
        held = [[[*places, N + t] for places in heads] for heads in kept]
    grows = {"h2o": 0, "tova": 0}.get(method, M)
    assert {len(kept) for heads in whole.kept_at_end for kept in heads} == {12 + grows}
    assert whole.kept_after_prompt == run(model, method, METHODS[method], PROMPT, []).kept_at_end
    assert 1e-9 < whole.gap < math.inf


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("positions", ["text", "cache"])
def test_with_sinks_and_window_forced_it_is_the_streaming_reference(family, positions):
    """Guards: positions counted anew; a query's place is after the keys kept, which keep the order of the text."""
    model, budget, sinks = model_of(family), 10, 2
    settings = {"budget": budget, "sinks": sinks, "window": budget - sinks, "positions": positions}
    outcome = run(model, "tova", settings, PROMPT[:budget], PROMPT[budget:])
    ids = [*PROMPT, 0]
    wanted = streaming_logits(double(model), ids, budget + 1, sinks, positions)  # a query sees itself and C others
    torch.testing.assert_close(outcome.logits, wanted[budget:], rtol=0, atol=1e-5)
    assert outcome.kept_at_end[0][0] == [0, 1, *range(N - 8, N)]
    moved = {**settings, "positions": "cache" if positions == "text" else "text"}
    other = run(model, "tova", moved, PROMPT[:budget], PROMPT[budget:])
    assert (other.logits - outcome.logits).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_prompt_is_chosen_by_the_attention_that_transformers_returns(family):
    """Guards: rows, sums, pooling and groups at the end of the prompt, against matrices of transformers' eager mode."""
    model = double(model_of(family))
    model.set_attn_implementation("eager")
    attentions = model(torch.tensor([PROMPT]), output_attentions=True).attentions
    groups = getattr(model.config, "num_key_value_heads", 4)
    for layer, attention in enumerate(attentions):
        rows = attention[0, :, -5:, :-5].sum(1)
        for pooling, pooled in [
            ("avg", F.avg_pool1d(rows, 3, stride=1, padding=1)),
            ("max", F.max_pool1d(rows, 3, stride=1, padding=1)),
        ]:
            per_group = pooled.view(groups, -1, N - 5)
            for group, wanted in [
                ("mean", per_group.mean(1)),
                ("max", per_group.amax(1)),
                ("sum", per_group.sum(1)),
                ("as_published", pooled),
            ]:
                settings = {"budget": 13, "window": 5, "kernel": 3, "pooling": pooling, "group": group, "sinks": 1}
                kept = run(model, "snapkv", settings, PROMPT, []).kept_after_prompt[layer]
                assert kept == [[0, *best(row, 7, 1), *range(N - 5, N)] for row in wanted]
        sums = attention[0].sum(1).view(groups, -1, N)
        for group, wanted in [("sum", sums.sum(1)), ("mean", sums.mean(1)), ("max", sums.amax(1))]:
            kept = run(model, "h2o", {"budget": 14, "group": group, "sinks": 2}, PROMPT, []).kept_after_prompt[layer]
            assert kept == [[0, 1, *best(row[: N - 7], 5, 2), *range(N - 7, N)] for row in wanted]
        kept = run(model, "tova", {"budget": 9}, PROMPT, []).kept_after_prompt[layer]
        assert kept == [[*best(attention[0, :, -1, :-1].mean(0), 8), N - 1]] * groups
        # A prompt that fits into the budget, and one eviction after the rest: all have attended to all.
        first, rest = PROMPT[:14], PROMPT[14:]
        kept = run(model, "h2o", {"budget": 14, "interval": N - 14}, first, rest).kept_at_end[layer]
        assert kept == [[*best(row[: N - 7], 7), *range(N - 7, N)] for row in sums.sum(1)]
        kept = run(model, "tova", {"budget": 14, "interval": N - 14}, first, rest).kept_at_end[layer]
        assert kept == [[*best(attention[0, :, -1, :-1].mean(0), 13), N - 1]] * groups


def best(scores: torch.Tensor, count: int, first: int = 0) -> list[int]:
    """Positions of the largest, sorted; those before `first` are left out, and of equal ones the earlier wins."""
    order = scores[first:].sort(descending=True, stable=True).indices[:count]
    return sorted((order + first).tolist())


def test_snapkv_by_hand():
    """Guards: which rows and columns are summed, the zeros that "avg" counts, the three group rules."""
    rows_4_5 = [
        [[0.1, 0.2, 0.3, 0.0, 0.4, 0.0], [0.1, 0.0, 0.1, 0.2, 0.1, 0.5]],  # sums of columns 0 … 3: .2 .2 .4 .2
        [[0.0, 0.0, 0.1, 0.6, 0.3, 0.0], [0.0, 0.1, 0.0, 0.2, 0.3, 0.4]],  # 0 .1 .1 .8
    ]
    attention = [[[9.0] * 6] * 4 + rows for rows in rows_4_5]  # nobody looks at rows 0 … 3
    for pooling, group, wanted in [
        ("avg", "mean", [0.25 / 3, 0.5 / 3, 0.9 / 3, 0.75 / 3]),
        ("avg", "max", [0.4 / 3, 0.8 / 3, 1.0 / 3, 0.9 / 3]),
        ("avg", "sum", [0.5 / 3, 1.0 / 3, 1.8 / 3, 1.5 / 3]),
        ("max", "mean", [0.15, 0.25, 0.6, 0.6]),
    ]:
        settings = {"window": 2, "kernel": 3, "pooling": pooling, "group": group}
        (found,) = scores.snapkv(attention, [[0, 1]], settings)
        assert found == pytest.approx([*wanted, 0, 0])
    settings = {"budget": 4, "window": 2, "sinks": 1}
    assert keep(dict(enumerate(found)), settings, 5)[0] == [0, 2, 4, 5]  # of the equal 2 and 3 the earlier


def test_expected_attention_by_hand():
    """Guards: the moments without the first tokens, the half, the scale, the group's mean, the length of the values."""
    queries = torch.tensor([[[7, 7], [3, 0], [-1, 0]], [[7, 7], [1, 2], [1, 0]]]).double()  # means (1, 0) and (1, 1)
    keys, values = torch.tensor([[[5, 5], [1, 0], [0, 1]]]).double(), torch.tensor([[[9, 9], [0, 2], [3, 4]]]).double()
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]]).double()  # means (.6, .8) and (-.2, 1.4)
    settings = {**DEFAULTS["expected_attention"], "n_sink": 1}
    (found,) = scores.expected_attention(queries, keys, values, turn, 0.5, settings)
    # Covariances diag(4, 0) and diag(0, 1), turned: diagonals (1.44, 2.56) and (.64, .36); an eighth of them is added
    second_less_first = [(0.4 + 0.32) - (0.3 + 0.18), (0.7 + 0.045) - (-0.1 + 0.08)]
    first = [1 / (1 + math.exp(x)) for x in second_less_first]
    assert found[1:] == pytest.approx([2 * sum(first) / 2, 5 * (1 - sum(first) / 2)])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_gemfilter_reads_the_chosen_tokens_again(family):
    """Guards: which layer and query choose, no softmax, and that the second reading knows nothing of the first."""
    model = model_of(family)
    for layer in (0, 1):
        outcome = run(model, "gemfilter", {"budget": 10, "layer": layer}, PROMPT, CONTINUATION)
        (chosen,) = {tuple(kept) for heads in outcome.kept_after_prompt for kept in heads}
        again = dense(model, [PROMPT[p] for p in chosen] + CONTINUATION)
        torch.testing.assert_close(outcome.prompt_logits, again[9], rtol=0, atol=1e-9)
        torch.testing.assert_close(outcome.logits, again[10:], rtol=0, atol=1e-9)
        assert outcome.kept_at_end[0][0] == [*chosen, *range(N, N + M)]
        query, key, _ = watched(model)[layer]
        pooled = F.avg_pool1d((query[:, -1:] @ key.mT)[:, 0].sum(0)[None], 5, stride=1, padding=2)[0]
        assert list(chosen) == best(pooled, 10)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_scores_read_keys_after_rope_and_expected_attention_the_positions_to_come(family):
    """Guards: what a scorer is given, in all layers; in the first, the averaged rotation and the variance of q·k."""
    model, given = model_of(family), []
    groups = getattr(model.config, "num_key_value_heads", 4)

    def score(keys, values):
        given.append((keys[0], values[0]))
        return by_norm(keys, values)

    kept = run(model, "scored", {"budget": 9, "score": score}, PROMPT, []).kept_after_prompt
    shared = 4 // groups
    for (keys, values), (_, wanted_k, wanted_v), heads in zip(given, watched(model), kept):
        torch.testing.assert_close(keys, wanted_k[::shared], rtol=0, atol=1e-9)
        torch.testing.assert_close(values, wanted_v[::shared], rtol=0, atol=1e-9)
        assert heads == [best(row, 9) for row in by_norm(keys, values)]

    query, (_, keys, values) = watched(model, still=True)[0][0], watched(model)[0]
    angles = torch.arange(N, N + 12)[:, None] * model.base_model.rotary_emb.inv_freq.double()
    turn, half = torch.polar(torch.ones_like(angles), angles).mean(0), angles.shape[1]
    pairs = torch.complex(query[..., :half], query[..., half : 2 * half]) * turn
    queries = torch.cat([pairs.real, pairs.imag, query[..., 2 * half :]], dim=-1)[:, 3:]
    dots = queries @ keys[:, 3:].mT * keys.shape[-1] ** -0.5  # [H, queries, keys]
    chances = torch.softmax(dots.mean(1) + dots.var(1, correction=0) / 2, dim=-1)
    wanted = chances.view(groups, shared, -1).mean(1) * values[::shared, 3:].norm(dim=-1)
    settings = {"budget": 9, "n_sink": 3, "n_future_positions": 12}
    outcome = run(model, "expected_attention", settings, PROMPT, [])
    assert outcome.kept_after_prompt[0] == [[0, 1, 2, *(3 + p for p in best(row, 6))] for row in wanted]


def watched(model, still: bool = False) -> list[tuple[torch.Tensor, ...]]:
    """q, k and v [H, N, D] of each layer, in which RoPE turned q and k, or not if all tokens are at position 0."""
    model, found = double(model), []

    def attention(module, query, key, value, mask, **kwargs):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        found.append((query[0], key[0], value[0]))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2), None

    AttentionInterface.register("watched-by-a-test", attention)
    model.set_attn_implementation("watched-by-a-test")
    model(torch.tensor([PROMPT]), position_ids=torch.zeros(1, N, dtype=torch.long) if still else None)
    return found
