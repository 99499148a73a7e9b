"""Guards the sizes that a StreamingCache reports: everything that it holds, and what of it belongs to tokens."""

from __future__ import annotations

import pickle

import pytest
import torch

from sinkmodel.cache import StreamingCache
from sinkmodel.cache.sizes import bytes_of
from tests.models import model_of, tokens

LAYERS, GROUPS, SIZE, FP32 = 2, 2, 8, 4
A_KEY = LAYERS * GROUPS * SIZE * FP32


def test_memory_that_tensors_share_is_counted_once():
    x = torch.zeros(10, 3)
    assert bytes_of([x, x[2:], x.mT, torch.zeros(5, dtype=torch.int16)]) == 10 * 3 * 4 + 5 * 2


@pytest.mark.parametrize("convention", ["inclusive", "paper"])
def test_slots_and_the_original_keys_of_the_sinks_are_held(convention):
    model, rows = model_of("llama"), 2
    cache = StreamingCache(model.config, 16, 3, convention=convention)
    assert (cache.bytes_held, cache.bytes_kept, cache.keys_kept) == (0, 0, 0)
    mask = torch.ones(rows, 10, dtype=torch.long)
    mask[0, :4] = 0
    model(torch.tensor([tokens(10), tokens(10, seed=1)]), attention_mask=mask, past_key_values=cache)
    held = rows * A_KEY * (2 * cache.slots + 3)
    assert cache.bytes_held == held
    assert cache.bytes_kept == (6 + 10) * 2 * A_KEY, "tokens, keys and values"
    assert cache.keys_kept == 8
    for row in range(3):
        model(torch.tensor([tokens(5, seed=row)] * rows), past_key_values=cache)
    assert (cache.bytes_held, cache.bytes_kept) == (held, rows * cache.slots * 2 * A_KEY)
    assert cache.keys_kept == cache.slots


def test_nothing_that_is_held_is_left_out():
    """Risk: a tensor that is added to the state later. A pickled cache has all of them, and little else."""
    model = model_of("llama")
    cache = StreamingCache(model.config, 1024, 512)
    model(torch.tensor([tokens(40)]), past_key_values=cache)
    assert cache.bytes_held < len(pickle.dumps(cache)) < cache.bytes_held + 0.05 * 2 * 1024 * A_KEY
