"""Matrix products of a CPU in fp32 through oneDNN, if it computes them faster than PyTorch's own library.

    with fast_products():
        model(ids)        # large F.linear, forward and backward, and `matmul` of this module

PyTorch uses MKL for them. On some processors MKL does not use the widest instructions: on an AMD core it reached 105
GFLOP/s, and oneDNN, which is also part of PyTorch, 240. On others MKL is as fast or faster. Which library is faster is
measured once in a process, in about 50 ms; scoring and training are measured separately. The results are equal to
rounding, about 1e-6. The environment variable SINKMODEL_PRODUCTS overrules the measurement: `torch` for PyTorch's own
library, `onednn` for oneDNN, `auto` to measure.

Torch 2.13 has no public way. `set_float32_matmul_precision` and `torch.backends.mkldnn` choose oneDNN for fp32 only
with rounding to bf16 or tf32; inductor calls MKL, with freezing too; a product of `Tensor.to_mkldnn` copies its input
and its output, and a convolution with a 1 × 1 filter is slow backward. So this calls the operator that inductor itself
calls, `torch.ops.mkldnn._linear_pointwise`. It is private to torch (seen in 2.13): it is used only if it is there and
gives the right numbers, and no other module calls it.

Models are not changed: a `TorchFunctionMode` intercepts the calls of F.linear in the block, in this thread. It passes
on to PyTorch what is small (a decoding step), not fp32, not on a CPU, under autocast, or a subclass of Tensor.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from sinkmodel.errors import UserError

SWITCH = "SINKMODEL_PRODUCTS"
TORCH, ONEDNN, AUTO = "torch", "onednn", "auto"

ROWS = 16  # fewer are a decoding step, which reads weights and computes little
WORK = 1 << 22  # M · N · K, below which a call costs more than it gains
GAIN = 1.15  # how much faster oneDNN must be to be taken: what is as fast keeps PyTorch's bits
FAR = 1024  # numbers between the rows of a matrix, which a multiple of this puts into the same lines of the cache


# ------------------------------------------------------------------------------------------------------ which library


def asked() -> str:
    """The value of SINKMODEL_PRODUCTS. Raises UserError if it is none of the three, or oneDNN cannot be used here."""
    wanted = os.environ.get(SWITCH, "").strip().lower() or AUTO
    if wanted not in (TORCH, ONEDNN, AUTO):
        raise UserError(f"{SWITCH} is {wanted!r} in the environment; set it to {AUTO}, {TORCH} or {ONEDNN}")
    if wanted == ONEDNN and not usable():
        raise UserError(f"{SWITCH} is {ONEDNN}, but this build of torch has no such product; set it to {AUTO}")
    return wanted


def library(backward: bool = True) -> str:
    """`torch` or `onednn`: what SINKMODEL_PRODUCTS names, or else the faster one here. Raises UserError as `asked`.

    Args:
        backward: whether gradients are computed too. oneDNN gains least in the gradient of a weight, so it may be the
            faster one for scoring and not for training.
    """
    wanted = asked()
    return _faster(backward) if wanted == AUTO else wanted


@functools.cache
def usable() -> bool:
    """Whether torch has the operator, and it gives the products that are expected of it."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        with torch.inference_mode(False), torch.no_grad():
            x_MK, weight_NK, grad_MN = _example(32, 48, 64)
            pairs = [(ours(), theirs()) for ours, theirs in _products(x_MK, weight_NK, grad_MN)]
    except (AttributeError, RuntimeError, TypeError):  # it is gone, or takes something else
        return False
    return all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4) for ours, theirs in pairs)


@functools.cache
def _faster(backward: bool) -> str:
    """The library that takes less time of one core for a linear layer, or for its gradients too: best of a few tries.

    If the system measures a thread's own time finely, that is taken, so that other programs do not disturb it.
    """
    if not usable():
        return TORCH
    fine = time.get_clock_info("thread_time").resolution < 1e-5
    clock = time.thread_time if fine else time.perf_counter
    threads, total = torch.get_num_threads(), [0.0, 0.0]
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.no_grad():
            for pair in _products(*_example(256, 384, 1024))[: 3 if backward else 1]:
                tries: tuple[list[float], list[float]] = ([], [])
                for _ in range(5):  # the first one warms up
                    for product, times in zip(pair, tries):
                        start = clock()
                        product()
                        times.append(clock() - start)
                total = [sum(pair) for pair in zip(total, map(min, tries))]
    finally:
        torch.set_num_threads(threads)
    ours, theirs = total
    return ONEDNN if ours * GAIN < theirs else TORCH


def _example(M: int, K: int, N: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay what they are
    shapes = (M, K), (N, K), (M, N)
    x_MK, weight_NK, grad_MN = (torch.randn(shape, generator=generator) for shape in shapes)
    return x_MK, weight_NK, grad_MN


def _products(x_MK: Tensor, weight_NK: Tensor, grad_MN: Tensor) -> list[tuple[Callable, Callable]]:
    """Ours and PyTorch's of a linear layer: output, gradient of the input, gradient of the weight."""
    return [
        (lambda: _times(x_MK, weight_NK), lambda: F.linear(x_MK, weight_NK)),
        (lambda: _times(grad_MN, weight_NK.t()), lambda: grad_MN @ weight_NK),
        (lambda: _transposed_times(grad_MN, x_MK), lambda: grad_MN.t() @ x_MK),
    ]


# ---------------------------------------------------------------------------------------------------------- in a block

_CHOSEN: ContextVar[str | None] = ContextVar("sinkmodel_products", default=None)  # None outside of every block


_USED: set[str] = set()  # beside PyTorch's own library, by this process


def used() -> str:
    """`onednn` if any product of this process went through it, else `torch`."""
    return ONEDNN if ONEDNN in _USED else TORCH


@contextlib.contextmanager
def fast_products(chosen: str | None = None, rows: int = ROWS) -> Iterator[None]:
    """Within the block, F.linear and `matmul` go through the chosen library.

    Args:
        chosen: `torch`, `onednn`, or None for what a block around this one has chosen, else `library()`, which then is
            not asked before the first product that is large enough.
        rows: how many rows the products will have; with fewer than ROWS the block does nothing.

    Raises UserError as `asked`.
    """
    if rows < ROWS:
        yield
        return
    before = _CHOSEN.get()
    chosen = chosen or before or asked()
    watched = before not in (None, TORCH)
    token = _CHOSEN.set(chosen)
    try:
        with contextlib.nullcontext() if watched or chosen == TORCH else _Linears():
            yield
    finally:
        _CHOSEN.reset(token)


class _Linears(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = linear if func is F.linear and not torch.compiler.is_compiling() else func
        return function(*args, **(kwargs or {}))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, through oneDNN if the block has chosen it and the product is large; differentiable once."""
    if not _through_onednn(input, weight):
        return F.linear(input, weight, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (input, weight, bias)):
        return _Linear.apply(input, weight, bias)
    return _linear(input, weight, bias)


def matmul(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b of two matrices, without gradients; as `linear`. `a` may be a transposed view."""
    if not _through_onednn(a_MK, b_KN.t()):
        return a_MK @ b_KN
    return _times(a_MK, b_KN.t()) if a_MK.is_contiguous() else _transposed_times(a_MK.t(), b_KN)


def _through_onednn(input: Tensor, weight_NK: Tensor) -> bool:
    """Whether this product goes through oneDNN here."""
    chosen = _CHOSEN.get()
    if chosen in (None, TORCH) or weight_NK.dim() != 2 or input.dim() < 2:
        return False
    plain = all(type(x) in (Tensor, torch.nn.Parameter) for x in (input, weight_NK))
    if not plain or not all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (input, weight_NK)):
        return False
    rows = input.numel() // max(1, input.shape[-1])
    if rows < ROWS or rows * weight_NK.numel() < WORK or torch.is_autocast_enabled("cpu"):
        return False
    through = (library(torch.is_grad_enabled()) if chosen == AUTO else chosen) == ONEDNN
    if through:
        _USED.add(ONEDNN)
    return through


class _Linear(torch.autograd.Function):
    """Keeps what its gradients need, as F.linear: of a frozen weight no gradient is computed, and no input kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.shape = input.shape
        ctx.save_for_backward(
            input if ctx.needs_input_grad[1] else None, weight_NK if ctx.needs_input_grad[0] else None
        )
        return _linear(input, weight_NK, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight_NK = ctx.saved_tensors
        grad_MN = grad.reshape(-1, grad.shape[-1])
        grads: list[Tensor | None] = [None] * 3
        if weight_NK is not None:
            grads[0] = _times(grad_MN, weight_NK.t()).view(ctx.shape)
        if input is not None:
            grads[1] = _transposed_times(grad_MN, input.reshape(-1, ctx.shape[-1]))
        if ctx.needs_input_grad[2]:
            grads[2] = grad_MN.sum(0)
        return tuple(grads)


def _linear(input: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return _times(input.reshape(-1, input.shape[-1]), weight_NK, bias_N).view(*input.shape[:-1], len(weight_NK))


def _times(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, [M, N], contiguous. The weight may be a transposed view: it is copied only if that pays."""
    rows_far_apart = weight_NK.stride(1) % FAR == 0 and len(x_MK) >= FAR // 2  # up to four times slower than a copy
    if not weight_NK.is_contiguous() and (rows_far_apart or not weight_NK.t().is_contiguous()):
        weight_NK = weight_NK.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x_MK.contiguous(), weight_NK, bias_N, "none", [], "")


def _transposed_times(a_MN: Tensor, b_MK: Tensor) -> Tensor:
    """a.T @ b, [N, K], contiguous. One of the two has to be copied, and of the second one the result as well."""
    (M, N), K = a_MN.shape, b_MK.shape[1]
    a_MN, b_MK = a_MN.contiguous(), b_MK.contiguous()
    if M * N <= M * K + N * K:
        return _times(a_MN.t(), b_MK.t())
    return _times(b_MK.t(), a_MN.t()).t().contiguous()
