"""Risk: on a GPU a sink in the softmax goes through kernels that no CPU has, and their gradients come out wrong."""

from __future__ import annotations

import pytest
import torch

from bench.gpu.machine import DEVICE, KERNEL, sized
from sinkmodel.softmax_sinks import attention
from sinkmodel.softmax_sinks.attention import attend

B, H = 2, 4
D, SCALE = sized(64, 16), 0.3
LONG = sized(1000, 70)  # no multiple of a kernel's block
LENGTHS = [(1, 9), (5, 9), (LONG, LONG)]  # T queries and K keys
# Largest error in parts of the largest number: some roundings of the dtype, in sums over LONG keys.
BOUNDS = {torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def written_out(q, k, v, score_BHT):
    """The column written out, in fp64: softmax over the sink's score and the keys'; the sink's value is zero."""
    T, K = q.shape[2], k.shape[2]
    seen_TK = torch.ones(T, K, dtype=torch.bool, device=q.device)
    scores_BHTK = (q @ k.transpose(-1, -2) * SCALE).masked_fill(~(seen_TK.tril() if T > 1 else seen_TK), float("-inf"))
    return torch.softmax(torch.cat([score_BHT[..., None], scores_BHTK], dim=-1), dim=-1)[..., 1:] @ v


def drawn(T: int, K: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v and the sink's scores in fp32, which is what they are in a model; and a gradient from above."""
    generator = torch.Generator().manual_seed(T + K)
    shapes = (B, H, T, D), (B, H, K, D), (B, H, K, D), (B, H, T), (B, H, T, D)
    q, k, v, score, above = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
    inputs = [x.requires_grad_() for x in (q.to(dtype), k.to(dtype), v.to(dtype), 4 * score)]
    return inputs, above.to(dtype)


def check(function, T: int, K: int, dtype: torch.dtype) -> None:
    inputs, above = drawn(T, K, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y, expected = function(*inputs, None, SCALE), written_out(*exact)
    ours = torch.autograd.grad(y, inputs, above)
    theirs = torch.autograd.grad(expected, exact, above.double())
    assert y.dtype == dtype
    for name, a, b in zip(("y", "q", "k", "v", "score"), (y, *ours), (expected, *theirs)):
        error, largest = (a.double() - b).abs().max().item(), b.abs().max().item()
        assert error <= BOUNDS[dtype] * max(largest, 0.1), f"{name}: off by {error:.1e} of {largest:.1e}"


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("T", "K"), LENGTHS)
def test_a_sink_is_one_more_column_forward_and_backward(T, K, dtype, monkeypatch):
    """Risk: the fused kernel is not taken, or its own backward pass is given what it does not expect."""
    by_column = []
    monkeypatch.setattr(attention, "_with_column", lambda *x, f=attention._with_column: by_column.append(1) or f(*x))
    check(attend, T, K, dtype)
    assert bool(by_column) == ((T, K) == (5, 9)), "that one alone has no fused kernel"


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_same_compiled(dtype):
    """Risk: gradients of the compiled function, which is what a run with training.compile computes."""
    torch._dynamo.reset()
    check(torch.compile(attend, **KERNEL), LONG, LONG, dtype)
