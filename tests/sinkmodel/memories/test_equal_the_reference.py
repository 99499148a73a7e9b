"""Guards: a memory keeps what its paper says, and computes with that alone; whole, in pieces, padded, step by step.

The reference is written out in fp64, a row and a token at a time (`reference.py`); it shares no code with the memories.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinkmodel.memories import MEMORIES, Scored, make_memory
from tests.models import IN_SOFTMAX, POSITIONS, build, model_of, tokens
from tests.sinkmodel.memories.reference import run

PROMPT, AFTER, SHORT = 40, 12, 9  # SHORT: a row below the budget
BUDGET = 16
FAMILIES = ("llama", "gpt_neox")
SETTINGS = {
    "snapkv": ("snapkv", {"window": 5, "kernel": 3}),
    "snapkv-avg-max": ("snapkv", {"window": 4, "kernel": 5, "pooling": "avg", "group": "max", "sinks": 2}),
    "snapkv-sum": ("snapkv", {"window": 7, "kernel": 1, "group": "sum"}),
    "snapkv-as-published": ("snapkv", {"window": 5, "kernel": 3, "group": "as_published"}),
    "h2o": ("h2o", {}),
    "h2o-max": ("h2o", {"window": 3, "group": "max", "sinks": 1}),
    "h2o-interval": ("h2o", {"window": 4, "interval": 5}),
    "h2o-as-published": ("h2o", {"group": "as_published", "sinks": 1}),
    "tova": ("tova", {}),
    "tova-interval": ("tova", {"window": 2, "interval": 4, "sinks": 3}),
    "expected-attention": ("expected-attention", {}),
    "expected-attention-plain": (
        "expected-attention",
        {"sinks": 1, "future": 7, "covariance": False, "value_norm": False, "group": "max"},
    ),
    "gemfilter": ("gemfilter", {"layer": 1}),
    "gemfilter-forced": ("gemfilter", {"layer": 0, "kernel": 3, "pooling": "max", "sinks": 2, "window": 3}),
    "scored": ("scored", {"sinks": 1, "window": 2}),
}
NAMES = {"sinks": "n_sink", "future": "n_future_positions", "covariance": "use_covariance", "value_norm": "use_vnorm"}
CASES = [
    pytest.param(name, positions, id=f"{name}-{positions}")
    for name in SETTINGS
    for positions in ("text", "cache")
    if not (positions == "cache" and name.startswith("gemfilter"))
]


def lengths_of_values(keys, values):
    return values.norm(dim=-1)


def memory_of(name: str, model, positions: str = "text", budget: int = BUDGET):
    kind, settings = SETTINGS[name]
    own = {} if kind == "gemfilter" else {"positions": positions}
    if kind == "scored":
        scorer = lambda module, hidden, keys, values, attentions, kwargs: lengths_of_values(keys, values)  # noqa: E731
        return Scored(model.config, scorer, budget, **settings, **own)
    return make_memory(kind, model.config, budget, **settings, **own)


@functools.cache
def expected(family: str, name: str, positions: str, count: int, budget: int = BUDGET):
    """What the reference keeps and computes for the last `count` tokens of the prompt, and what comes after it."""
    kind, settings = SETTINGS[name]
    settings = dict(settings)
    if kind == "expected-attention":
        settings = {NAMES.get(key, key): value for key, value in settings.items()}
    if kind == "scored":
        settings["score"] = lengths_of_values
    ids = tokens(PROMPT + AFTER)
    settings |= {"budget": budget} if kind == "gemfilter" else {"budget": budget, "positions": positions}
    outcome = run(model_of(family), kind.replace("-", "_"), settings, ids[PROMPT - count : PROMPT], ids[PROMPT:])
    assert outcome.gap > 1e-5, "the choice hangs on rounding: change the seed"
    return outcome


def check(memory, outcome, logits, row: int = 0, kept: str = "kept_at_end"):
    torch.testing.assert_close(logits.double(), outcome.logits, atol=1e-4, rtol=0)
    assert [memory.kept_positions(layer, row) for layer in range(len(memory.layers))] == getattr(outcome, kept)


def after(model, memory, ids, *sizes: int):
    """Logits of the tokens after the prompt, [B, M, V], in forwards of these sizes in turn."""
    pieces, at = [], 0
    while at < ids.shape[1]:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(model(ids[:, at : at + size], past_key_values=memory).logits)
        at += size
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "positions"), CASES)
@pytest.mark.parametrize("known", [True, False], ids=["end-known", "end-late"])
@pytest.mark.parametrize("sizes", [[1], [AFTER], [3, 1]], ids=["steps", "one-forward", "mixed"])
def test_a_whole_prompt(family, name, positions, known, sizes):
    model, ids = model_of(family), torch.tensor([tokens(PROMPT + AFTER)])
    memory, outcome = memory_of(name, model, positions), expected(family, name, positions, PROMPT)
    if known:
        memory.expect(PROMPT)
    first = model(ids[:, :PROMPT], past_key_values=memory).logits[0, -1]
    if not known:
        memory.end_prompt()
    else:
        torch.testing.assert_close(first.double(), outcome.prompt_logits, atol=1e-4, rtol=0)
    assert [memory.kept_positions(layer) for layer in range(len(memory.layers))] == outcome.kept_after_prompt
    check(memory, outcome, after(model, memory, ids[:, PROMPT:], *sizes)[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "positions"), CASES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_prompt_in_pieces_and_with_a_step_that_ends_it(family, name, positions, implementation):
    model = model_of(family, attn_implementation=implementation)
    ids = torch.tensor([tokens(PROMPT + AFTER)])
    for known in (True, False):
        memory, outcome = memory_of(name, model, positions), expected(family, name, positions, PROMPT)
        if known:
            memory.expect(PROMPT)
        for piece in ids[:, :PROMPT].split(3, dim=1):
            if piece.shape[1] == 1 and not known:  # it would end the prompt
                memory.expect(PROMPT)
            model(piece, past_key_values=memory)
        check(memory, outcome, after(model, memory, ids[:, PROMPT:], 1)[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "positions"), CASES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("piece", [PROMPT, 7])
def test_rows_of_unequal_length_are_as_alone(family, name, positions, implementation, piece):
    model = model_of(family, attn_implementation=implementation)
    counts = [PROMPT, SHORT, 25]
    text = tokens(PROMPT + AFTER)
    ids = torch.tensor([[0] * (PROMPT - n) + text[PROMPT - n :] for n in counts])
    mask = torch.tensor([[0] * (PROMPT - n) + [1] * (n + AFTER) for n in counts])
    memory = memory_of(name, model, positions)
    memory.expect(PROMPT)
    for start in range(0, PROMPT, piece):
        end = min(PROMPT, start + piece)
        model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=memory)
    logits = after(model, memory, ids[:, PROMPT:], 3, 1)
    for row, count in enumerate(counts):
        check(memory, expected(family, name, positions, count), logits[row], row)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "gemma", "phi", "mistral", "llama-yarn", "smollm3", *IN_SOFTMAX])
@pytest.mark.parametrize("name", ["snapkv", "h2o", "tova", "expected-attention", "gemfilter"])
@pytest.mark.parametrize("positions", ["text", "cache"])
def test_other_families(family, name, positions):
    if name == "gemfilter" and positions == "cache":
        positions = "text"
    model, ids = model_of(family), torch.tensor([tokens(PROMPT + AFTER)])
    memory, outcome = memory_of(name, model, positions), expected(family, name, positions, PROMPT)
    memory.expect(PROMPT)
    model(ids[:, :PROMPT], past_key_values=memory)
    check(memory, outcome, after(model, memory, ids[:, PROMPT:], 5, 1)[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["h2o", "h2o-max", "h2o-as-published", "tova"])
@pytest.mark.parametrize("positions", ["text", "cache"])
@pytest.mark.parametrize("sizes", [[1], [AFTER], [3, 1]], ids=["steps", "one-forward", "mixed"])
def test_a_prompt_that_fits_is_kept_whole_and_evicted_from_later(family, name, positions, sizes):
    """Risk: with "as_published", KV heads whose first eviction comes while decoding."""
    model, ids = model_of(family), torch.tensor([tokens(PROMPT + AFTER)])
    memory, outcome = memory_of(name, model, positions), expected(family, name, positions, SHORT)
    memory.expect(SHORT)
    model(ids[:, PROMPT - SHORT : PROMPT], past_key_values=memory)
    assert SHORT < BUDGET < SHORT + AFTER
    check(memory, outcome, after(model, memory, ids[:, PROMPT:], *sizes)[0])


@pytest.mark.parametrize("name", ["snapkv", "h2o", "tova", "expected-attention", "gemfilter"])
@pytest.mark.parametrize("piece", [PROMPT, 11])
def test_a_cap_of_the_scores(name, piece):
    """Risk: a softcap that is left out where attention is observed, as of Gemma2 within its native window."""
    model = model_of(
        "Gemma2", num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=POSITIONS,
        attn_logit_softcapping=0.5, attn_implementation="eager",
    )  # fmt: skip
    kind, settings = SETTINGS[name]
    settings = {**settings, "budget": BUDGET}
    ids = tokens(PROMPT + AFTER)
    named = {NAMES.get(key, key): value for key, value in settings.items()}
    outcome = run(model, kind.replace("-", "_"), named, ids[:PROMPT], ids[PROMPT:])
    assert outcome.gap > 1e-5, "the choice hangs on rounding: change the seed"
    memory, fed = make_memory(kind, model.config, **settings), torch.tensor([ids])
    memory.expect(PROMPT)
    for part in fed[:, :PROMPT].split(piece, dim=1):
        model(part, past_key_values=memory)
    check(memory, outcome, after(model, memory, fed[:, PROMPT:], 3, 1)[0])


def test_every_memory_is_compared():
    elsewhere = {"dense", "namm"}  # the latter in test_namm.py
    assert {kind for kind, _ in SETTINGS.values()} | elsewhere == {*MEMORIES, "scored"}


def causal_from_the_end(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """What flash attention computes, by its documentation: no mask, and the last query sees the last key."""
    assert attention_mask is None
    assert module.config._attn_implementation == "flash_attention_2"
    N, K = query.shape[2], key.shape[2]
    seen = torch.ones(N, K, dtype=torch.bool).tril(K - N)
    output = F.scaled_dot_product_attention(query, key, value, seen, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


@pytest.mark.parametrize("name", SETTINGS)
def test_flash_attention_gets_no_mask(name, monkeypatch):
    """In the whole prompt, in pieces of it, and after it; flash attention itself needs a GPU."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", causal_from_the_end)
    model, ids = build("llama"), torch.tensor([tokens(PROMPT + AFTER)])
    model.config._attn_implementation = "flash_attention_2"
    for piece in (PROMPT, 11):
        memory, outcome = memory_of(name, model), expected("llama", name, "text", PROMPT)
        memory.expect(PROMPT)
        for part in ids[:, :PROMPT].split(piece, dim=1):
            model(part, past_key_values=memory)
        check(memory, outcome, after(model, memory, ids[:, PROMPT:], 3, 1)[0])
    assert model.config._attn_implementation == "flash_attention_2"
