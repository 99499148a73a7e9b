"""Risk: on a GPU a KV memory keeps other tokens than on a CPU: another block size, another order of equal scores."""

from __future__ import annotations

import pytest
import torch

from bench.gpu.machine import DEVICE
from sinkmodel.memories import BUDGETED, NAMM, Dense, make_memory
from tests.eval.namm import CONFIG, PARAMETERS
from tests.models import build, cast, tokens

PROMPT, AFTER, BUDGET = 40, 6, 16
NAMES = ["dense", *BUDGETED, "namm"]
# dtype on the device: the least share of slots that hold the same tokens as on the CPU in fp32, and the largest
# difference between logits if all of them do. bf16 has 8 bits, so tokens of nearly equal scores change places.
BOUNDS = {torch.float32: (0.98, 2e-3), torch.bfloat16: (0.7, 1.0)}


@torch.no_grad()
def read(name: str, device: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The positions [B, G, K] that each layer holds after the prompt, and logits of the prompt's end and after it."""
    model = cast(build("llama"), dtype).to(device)
    own = {"dense": lambda: Dense(model.config), "namm": lambda: NAMM(model, CONFIG, PARAMETERS)}
    if name == "snapkv":
        own[name] = lambda: make_memory(name, model, BUDGET, window=4)
    memory = own.get(name, lambda: make_memory(name, model, BUDGET))()
    prompt, after = (torch.tensor([ids], device=device) for ids in (tokens(PROMPT), tokens(AFTER, seed=1)))
    memory.expect(PROMPT)
    logits = [model(prompt, past_key_values=memory, logits_to_keep=1).logits]
    held = [layer.held_positions().cpu() for layer in memory.layers]
    logits += [model(step, past_key_values=memory).logits for step in after.split(1, dim=1)]
    return held, torch.cat(logits, dim=1).float().cpu()


def shared(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The share of slots, over heads, that hold tokens which the other one holds too."""
    both = [len(set(a.tolist()) & set(b.tolist())) / len(a) for a, b in zip(ours[0], theirs[0])]
    return sum(both) / len(both)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_memory_keeps_what_it_keeps_on_a_cpu_in_fp32(name, dtype):
    least, largest = BOUNDS[dtype]
    expected, expected_logits = read(name, "cpu", torch.float32)
    held, logits = read(name, DEVICE, dtype)
    shares = [shared(a, b) for a, b in zip(held, expected)]
    assert min(shares) >= least, shares
    assert expected[0].shape[-1] == PROMPT if name == "dense" else expected[0].shape[-1] < PROMPT
    if min(shares) == 1:
        assert (logits - expected_logits).abs().max() < largest
    assert torch.isfinite(logits).all()
