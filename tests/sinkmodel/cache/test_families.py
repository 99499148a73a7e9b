"""Guards: in every family, the logits of a cache are those of a stream that turns all original keys at each token."""

from __future__ import annotations

import functools

import pytest
import torch

from sinkmodel.cache import StreamingCache
from tests.models import POSITIONS, STREAMED, model_of, tokens
from tests.streams import NO_ROTATION, fed, greedy_ids, held, stream_logits

pytestmark = pytest.mark.filterwarnings("ignore:sinks=0")
LENGTH, BUDGET = 40, 12
EAGER_ALONE = {"gptj", "mpt"}  # transformers has no sdpa for them
reference = functools.lru_cache(stream_logits)
GREEDY = {"do_sample": False, "max_new_tokens": 16, "output_logits": True, "return_dict_in_generate": True}
CASES = [
    pytest.param(family, implementation, positions, id=f"{family}-{implementation}-{positions}")
    for family in STREAMED
    for implementation in ("sdpa", "eager")
    for positions in ("cache", "text")
    if not (implementation == "sdpa" and family in EAGER_ALONE)
    if not (positions == "text" and family in NO_ROTATION)
]


def expected(family: str, budget: int, sinks: int, positions: str = "cache") -> torch.Tensor:
    return reference(model_of(family), tuple(tokens(LENGTH)), budget, sinks, positions)


@pytest.mark.parametrize("pieces", [[1], [LENGTH], [5, 1, 14]], ids=["token-by-token", "one-forward", "mixed"])
@pytest.mark.parametrize(("family", "implementation", "positions"), CASES)
def test_equals_the_reference(family, implementation, positions, pieces):
    model = model_of(family, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    for sinks in (0, 1, 4):
        cache = StreamingCache(model.config, BUDGET, sinks, positions)
        logits = fed(model, cache, tokens(LENGTH), *pieces)
        torch.testing.assert_close(logits, expected(family, BUDGET, sinks, positions), atol=1e-4, rtol=0)
        assert cache.seen == [LENGTH]
        assert cache.get_seq_length() == LENGTH
        assert {x.shape[2] for x in held(cache)} == {cache.slots} == {BUDGET}


@pytest.mark.parametrize(("family", "implementation", "positions"), CASES)
@pytest.mark.parametrize("prompt", [5, 30])
def test_generate_equals_the_references_greedy_continuation(family, implementation, positions, prompt):
    model, ids = model_of(family, attn_implementation=implementation), tokens(prompt)
    cache = StreamingCache(model.config, BUDGET, 4, positions)
    out = model.generate(torch.tensor([ids]), past_key_values=cache, **GREEDY)
    made = out.sequences[0].tolist()
    truth = stream_logits(model_of(family), made[:-1], BUDGET, 4, positions)[prompt - 1 :]
    torch.testing.assert_close(torch.cat(out.logits), truth, atol=1e-4, rtol=0)
    assert made[prompt:] == truth.argmax(-1).tolist() == greedy_ids(model_of(family), ids, BUDGET, 4, 16, positions)
    assert cache.seen == [prompt + 15]


@pytest.mark.parametrize("pieces", [[1], [LENGTH], [5, 1, 14]], ids=["token-by-token", "one-forward", "mixed"])
@pytest.mark.parametrize("family", STREAMED)
def test_the_papers_convention_shows_one_key_more(family, pieces):
    model = model_of(family)
    for sinks in (0, 4):
        cache = StreamingCache(model.config, BUDGET - 1, sinks, convention="paper")
        logits = fed(model, cache, tokens(LENGTH), *pieces)
        torch.testing.assert_close(logits, expected(family, BUDGET, sinks), atol=1e-4, rtol=0)
        assert (cache.slots, cache.budget) == (BUDGET, BUDGET - 1)


@pytest.mark.parametrize("family", ["gptj", "llama-dynamic", "mpt"])
def test_a_stream_outlives_the_models_table(family):
    """Guards positions: GPT-J and MPT have a table, dynamic scaling a length, that no long stream may run out of."""
    model, ids = model_of(family), tokens(3 * POSITIONS)
    truth = stream_logits(model, ids, 16, 2)
    for budget, convention in ((16, "inclusive"), (15, "paper")):
        for pieces in ([1], [len(ids)], [40, 1, 9]):
            cache = StreamingCache(model.config, budget, 2, convention=convention)
            torch.testing.assert_close(fed(model, cache, ids, *pieces), truth, atol=1e-4, rtol=0)
