"""Guards the reference that the cache is held to: it is checked against written-out attention, and against masks."""

from __future__ import annotations

import pytest
import torch

from tests.models import FAMILIES, STREAMED, model_of, tokens
from tests.reference import streaming_logits
from tests.streams import NO_ROTATION, Stream, greedy_ids, rope, stream_logits

LENGTH, BUDGET = 40, 12
ROTARY = [family for family in STREAMED if family not in NO_ROTATION]


@torch.no_grad()
def masked(model, ids: list[int], budget: int, sinks: int) -> torch.Tensor:
    """Logits [T, V] of one dense forward whose mask alone says who sees whom; every token at its true position."""
    query, key = torch.arange(len(ids))[:, None], torch.arange(len(ids))
    window = query - key < budget - sinks
    seen = (key <= query) & (window | (key < sinks) | (query < budget))
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    if model.config.model_type == "mpt":
        mask = ~seen  # MPT's mask marks what must not be seen
    return model(torch.tensor([ids]), attention_mask=mask[None, None]).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_equals_attention_written_out(family, sinks):
    model, ids = model_of(family), tokens(LENGTH)
    written = streaming_logits(model, ids, BUDGET, sinks)
    torch.testing.assert_close(stream_logits(model, ids[:-1], BUDGET, sinks), written, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", STREAMED)
def test_is_the_dense_model_while_nothing_is_lost(family):
    model, ids = model_of(family), tokens(LENGTH)
    with torch.no_grad():
        dense = model(torch.tensor([ids])).logits[0]
    for positions in ("cache", "text"):
        streamed = stream_logits(model, ids, LENGTH, 3, positions)
        torch.testing.assert_close(streamed, dense, atol=1e-4, rtol=0)
    new = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, LENGTH), do_sample=False, max_new_tokens=5)
    assert greedy_ids(model, ids, LENGTH + 5, 3, 5) == new[0, LENGTH:].tolist()


@pytest.mark.parametrize("family", STREAMED)
def test_a_plain_window_is_a_mask(family):
    model, ids = model_of(family), tokens(LENGTH)
    streamed = stream_logits(model, ids, BUDGET, 0)
    torch.testing.assert_close(streamed, masked(model, ids, BUDGET, 0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ROTARY)
def test_sinks_at_their_true_positions_are_a_mask(family):
    model, ids = model_of(family), tokens(LENGTH)
    streamed = stream_logits(model, ids, BUDGET, 3, "text")
    torch.testing.assert_close(streamed, masked(model, ids, BUDGET, 3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", STREAMED)
def test_one_key_more_or_less_is_another_result(family):
    """Guards all that is compared with the reference: a mask, a place or a count that is off by one would be seen."""
    model, ids = model_of(family), tokens(LENGTH)
    exact = stream_logits(model, ids, BUDGET, 2)
    others = {
        (budget, sinks): stream_logits(model, ids, budget, sinks)
        for budget, sinks in ((BUDGET - 1, 2), (BUDGET + 1, 2), (BUDGET, 1), (BUDGET, 3), (BUDGET + 1, 3))
    }
    if family in ROTARY:
        others["text"] = stream_logits(model, ids, BUDGET, 2, "text")
    for what, other in others.items():
        assert (exact - other)[BUDGET + 2 :].abs().amax(-1).min() > 1e-2, what
        assert torch.equal(exact[: BUDGET - 1], other[: BUDGET - 1])


@pytest.mark.parametrize("family", ROTARY)
def test_frequencies_are_the_models_own(family):
    model = model_of(family)
    frequencies, factor = rope(model.config)
    if family == "gptj":
        table = model.transformer.h[0].attn.embed_positions  # [positions, sines and cosines]
        torch.testing.assert_close(torch.arcsin(table[1, : len(frequencies)]), frequencies.float())
        return
    rotary = model.base_model.rotary_emb
    assert torch.equal(frequencies.float(), rotary.inv_freq)
    assert factor == rotary.attention_scaling


@pytest.mark.parametrize("family", ["llama", "gptj", "mpt"])
def test_a_leap_moves_the_sinks_alone(family):
    model, ids = model_of(family), tokens(LENGTH)
    for positions in ("cache", "text"):
        near, far = Stream(model, BUDGET, 2, positions), Stream(model, BUDGET, 2, positions)
        for token in ids:
            far.skip(1000 if far.seen == 20 else 0)
            same = torch.allclose(near.feed(token), far.feed(token), atol=1e-4)
            assert same == (positions == "cache" or family == "mpt" or far.seen <= 20)
        assert far.seen == LENGTH + 1000
        assert max(far.places()) < 64
