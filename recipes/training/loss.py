"""Head and cross-entropy in chunks, so that the logits of a whole batch never exist.

The logits of 32 rows × 2,048 positions × 50,304 words in fp32 take 13.2 GB. Here only the logits of one chunk of
positions exist at a time. Their gradient is known as soon as they are, so the gradients of hidden states and weights
are computed in the forward pass, and the backward pass only scales them. Nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from recipes.data.rows import IGNORE
from sinkmodel.products import linear, matmul


class LossHead(nn.Linear):
    """Replaces the model's output projection, with the same weight and bias; returns the loss if given targets.

    It takes that place because ZeRO-3 gathers a weight only for the forward of the module that owns it.
    """

    chunk: int
    softmax: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    def __init__(self, head: nn.Linear, chunk: int, compiled: bool = False):
        nn.Module.__init__(self)  # nn.Linear's would allocate a weight
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.chunk = head.weight, chunk
        self.softmax = torch.compile(scaled_softmax, dynamic=False) if compiled else scaled_softmax
        self.register_parameter("bias", head.bias)

    def forward(
        self,
        hidden_ND: torch.Tensor,
        targets_N: torch.Tensor | None = None,
        rows_SD: torch.Tensor | None = None,
        first_row: int = 0,
    ) -> Any:
        """Logits [N, V]; with targets, the mean nll and nll [N] of `chunked_cross_entropy`, which has the same Args."""
        if targets_N is None:
            assert rows_SD is None, "rows are for the loss"
            return super().forward(hidden_ND)
        return chunked_cross_entropy(
            hidden_ND, self.weight, targets_N, self.chunk, self.softmax, self.bias, rows_SD, first_row
        )


def scaled_softmax(logits_nV: torch.Tensor, scale_n1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logsumexp [n, 1] in fp32 (fp64 for fp64), and softmax × scale [n, V] in the dtype of the logits.

    The logits may be overwritten.

    Compiled, it reads the logits twice and writes them once; uncompiled, it passes over them seven times. On an H100
    the difference is a third of a step of Pythia-160M.
    """
    x_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
    lse_n1 = x_nV.logsumexp(1, keepdim=True)
    return lse_n1, x_nV.sub_(lse_n1).exp_().mul_(scale_n1).to(logits_nV.dtype)


def chunked_cross_entropy(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    targets_N: torch.Tensor,
    chunk: int,
    softmax: Callable[..., tuple[torch.Tensor, torch.Tensor]] = scaled_softmax,
    bias_V: torch.Tensor | None = None,
    rows_SD: torch.Tensor | None = None,
    first_row: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean negative log-likelihood over the targets that are not IGNORE, and that of each position.

    For an input that needs no gradient none is computed, and no buffer is allocated.

    Args:
        hidden_ND: last hidden states, [N, D].
        head_VD: weight of the output projection, [V, D].
        targets_N: int64, [N].
        chunk: number of positions whose logits exist at a time.
        softmax: `scaled_softmax`, compiled or not.
        bias_V: bias of the output projection, [V].
        rows_SD: values used instead of rows `first_row` … `first_row` + S − 1 of the weight, [S, D]. So a few rows of
            a frozen weight can be trained, at the cost of S more columns. The weight is not copied, and gets no
            gradient in these rows. None uses the weight's own rows.
        first_row: the first replaced row, at most V − S.

    Returns:
        The mean in nats, a scalar with gradients, and nll [N] without gradients in fp32 (fp64 for fp64), 0 at IGNORE.
    """
    # Inside apply() the grad mode is always off, and ctx.needs_input_grad ignores it: read it out here.
    wanted = torch.is_grad_enabled()
    return _ChunkedCrossEntropy.apply(hidden_ND, head_VD, bias_V, rows_SD, targets_N, first_row, chunk, softmax, wanted)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, head_VD: torch.Tensor, bias_V: torch.Tensor | None,
        rows_SD: torch.Tensor | None, targets_N: torch.Tensor, first_row: int, chunk: int,
        softmax: Callable[..., Any], grad_enabled: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        wide = torch.promote_types(dtype, torch.float32)
        scored_N = targets_N != IGNORE
        count = scored_N.sum().clamp(min=1)  # stays on the device: no sync
        nll_N = torch.empty(targets_N.shape, dtype=wide, device=hidden_ND.device)
        wants = [grad_enabled and x for x in ctx.needs_input_grad[:4]]
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants[0] else None
        grad_head_VD, grad_bias_V, grad_rows_SD = (
            torch.zeros_like(x, dtype=wide) if wanted and x is not None else None
            for x, wanted in zip((head_VD, bias_V, rows_SD), wants[1:])
        )
        with torch.autocast(device, enabled=False):
            weight_VD = head_VD.to(dtype)
            bias = None if bias_V is None else bias_V.to(dtype)
            if rows_SD is not None:
                columns = slice(first_row, first_row + len(rows_SD))
                rows, rows_bias = rows_SD.to(dtype), None if bias is None else bias[columns]
            for start in range(0, len(targets_N), chunk):
                part = slice(start, start + chunk)
                hidden_nD, scored_n = hidden_ND[part].to(dtype), scored_N[part]
                target_n1 = targets_N[part].clamp(min=0).unsqueeze(1)
                logits_nV = linear(hidden_nD, weight_VD, bias)
                if rows_SD is not None:
                    logits_nV[:, columns] = F.linear(hidden_nD, rows, rows_bias)
                picked_n1 = logits_nV.gather(1, target_n1).to(wide)
                if any(wants):
                    # d mean / d logits = (softmax - one-hot) / count if scored, else 0
                    scale_n1 = (scored_n.to(wide) / count).unsqueeze(1)
                    lse_n1, grad_nV = softmax(logits_nV, scale_n1)
                    grad_nV.scatter_add_(1, target_n1, -scale_n1.to(dtype))
                    if grad_bias_V is not None:
                        grad_bias_V += grad_nV.sum(0, dtype=wide)
                    if rows_SD is not None:
                        grad_nS = grad_nV[:, columns].clone()
                        grad_nV[:, columns] = 0  # the weight's own rows were not used
                    if grad_hidden_ND is not None:
                        grad_hidden_ND[part] = matmul(grad_nV, weight_VD)
                        if rows_SD is not None:
                            grad_hidden_ND[part] += grad_nS @ rows
                    if grad_head_VD is not None:
                        grad_head_VD += matmul(grad_nV.T, hidden_nD)
                    if grad_rows_SD is not None:
                        grad_rows_SD += grad_nS.T @ hidden_nD
                    del grad_nV
                else:
                    lse_n1 = logits_nV.to(wide).logsumexp(1, keepdim=True)
                nll_N[part] = (lse_n1 - picked_n1).squeeze(1) * scored_n
                del logits_nV  # before the next chunk's exist
        ctx.save_for_backward(grad_hidden_ND, grad_head_VD, grad_bias_V, grad_rows_SD)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_ND, head_VD, bias_V, rows_SD)]
        ctx.mark_non_differentiable(nll_N)
        return nll_N.sum() / count, nll_N

    @staticmethod
    def backward(ctx: Any, grad_mean: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [
            None if grad is None else (grad * grad_mean).to(dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return *scaled, None, None, None, None, None
