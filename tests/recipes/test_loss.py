"""Guards: the chunked loss is the plain one, in value and gradients, and never holds the whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recipes.data.rows import IGNORE
from recipes.training.loss import chunked_cross_entropy


def problem(places=50, hidden=16, words=301, seed=0):
    torch.manual_seed(seed)
    hidden_ND = torch.randn(places, hidden, requires_grad=True)
    head_VD = (torch.randn(words, hidden) * 0.3).requires_grad_()
    targets_N = torch.randint(0, words, (places,))
    targets_N[::7] = IGNORE
    return hidden_ND, head_VD, targets_N


@pytest.mark.parametrize("chunk", [1, 8, 13, 50, 1000])
def test_value_and_gradients_equal_the_plain_loss(chunk):
    hidden, head, targets = problem()
    plain = F.cross_entropy(hidden @ head.T, targets, ignore_index=IGNORE)
    want = torch.autograd.grad(plain * 0.25, [hidden, head])
    loss, nll = chunked_cross_entropy(hidden, head, targets, chunk)
    got = torch.autograd.grad(loss * 0.25, [hidden, head])
    assert abs(loss.item() - plain.item()) < 1e-5
    for a, b in zip(got, want):
        assert (a - b).abs().max() < 1e-5
        assert b.abs().max() > 1e-3, "gradients of nothing would pass as well"
    each = F.cross_entropy(hidden @ head.T, targets, ignore_index=IGNORE, reduction="none")
    assert (nll - each).abs().max() < 1e-5


def test_no_tensor_of_the_size_of_all_logits_is_made():
    hidden, head, targets = problem(places=256, words=500)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in [result] if isinstance(result, torch.Tensor) else []:
                Largest.seen = max(Largest.seen, tensor.numel())
            return result

    with Largest():
        loss, _ = chunked_cross_entropy(hidden, head, targets, 32)
        loss.backward()
    assert 32 * 500 <= Largest.seen < 256 * 500


def test_bf16_autocast_stays_close_and_keeps_fp32_gradients():
    hidden, head, targets = problem()
    plain = F.cross_entropy(hidden @ head.T, targets, ignore_index=IGNORE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = chunked_cross_entropy(hidden, head, targets, 16)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - plain.item()) < 2e-2
    assert head.grad.dtype == torch.float32


def test_gradients_are_not_computed_where_nobody_asks():
    hidden, head, targets = problem()

    class Scatters(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Scatters.count += "scatter_add" in str(function)
            return function(*args, **(kwargs or {}))

    with Scatters():
        with torch.no_grad():
            loss, _ = chunked_cross_entropy(hidden, head, targets, 16)
        assert not loss.requires_grad
        assert Scatters.count == 0
        chunked_cross_entropy(hidden, head, targets, 16)
        assert Scatters.count == 4, "one a chunk, where they are wanted"
