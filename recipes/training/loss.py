"""Head and cross-entropy in chunks, so that the logits of a whole batch never exist.

32 rows × 2,048 places × 50,304 words in fp32 are 13.2 GB. Here the logits of one chunk of places live at a time: the
gradient of the loss with respect to them is known as soon as they are, so hidden and weight gradients are computed in
the forward pass and only scaled in the backward pass. Nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from recipes.data.rows import IGNORE


class LossHead(nn.Linear):
    """The model's own output projection, the same weight, that gives the loss where it is given targets.

    The weight is used inside of its own module's forward, as a strategy that gathers weights module by module (ZeRO-3)
    needs it.
    """

    chunk: int
    softmax: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    def __init__(self, head: nn.Linear, chunk: int, compiled: bool = False):
        nn.Module.__init__(self)  # no weight of its own, not even for a moment
        assert head.bias is None
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.chunk = head.weight, chunk
        self.softmax = torch.compile(scaled_softmax, dynamic=False) if compiled else scaled_softmax
        self.register_parameter("bias", None)

    def forward(self, hidden_ND: torch.Tensor, targets_N: torch.Tensor | None = None):
        """Logits [N, V]; with targets, mean nll and nll [N] of `chunked_cross_entropy`."""
        if targets_N is None:
            return super().forward(hidden_ND)
        return chunked_cross_entropy(hidden_ND, self.weight, targets_N, self.chunk, self.softmax)


def scaled_softmax(logits_nV: torch.Tensor, scale_n1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logsumexp [n, 1] in fp32, and softmax × scale [n, V] in the dtype of the logits, which may be overwritten.

    Compiled it reads the logits twice and writes once, where op by op it goes over them seven times: on an H100 that
    is a third of a step of Pythia-160M.
    """
    x_nV = logits_nV.float()
    lse_n1 = x_nV.logsumexp(1, keepdim=True)
    return lse_n1, x_nV.sub_(lse_n1).exp_().mul_(scale_n1).to(logits_nV.dtype)


def chunked_cross_entropy(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    targets_N: torch.Tensor,
    chunk: int,
    softmax: Callable[..., tuple[torch.Tensor, torch.Tensor]] = scaled_softmax,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean negative log-likelihood over the targets that are not IGNORE, and that of each place.

    Args:
        hidden_ND: last hidden states, [N, D].
        head_VD: weight of the output projection, [V, D].
        targets_N: int64, [N].
        chunk: places whose logits exist at a time.
        softmax: `scaled_softmax`, compiled or not.

    Returns:
        The mean in nats, a scalar with gradients, and nll [N] in fp32 without (0 at IGNORE).
    """
    # Inside apply() gradients always look wanted: whether they are is known out here only.
    return _ChunkedCrossEntropy.apply(hidden_ND, head_VD, targets_N, chunk, softmax, torch.is_grad_enabled())


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, targets_N, chunk, softmax, grad_enabled):
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        wants_gradient = grad_enabled and any(ctx.needs_input_grad)
        scored_N = targets_N != IGNORE
        count = scored_N.sum().clamp(min=1)  # stays on the device: no sync
        nll_N = torch.empty(targets_N.shape, dtype=torch.float32, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND if wants_gradient else hidden_ND[:0])
        grad_head_VD = torch.zeros_like(head_VD if wants_gradient else head_VD[:0], dtype=torch.float32)
        with torch.autocast(device, enabled=False):
            weight_VD = head_VD.to(dtype)
            for start in range(0, len(targets_N), chunk):
                part = slice(start, start + chunk)
                hidden_nD, scored_n = hidden_ND[part].to(dtype), scored_N[part]
                target_n1 = targets_N[part].clamp(min=0).unsqueeze(1)
                logits_nV = hidden_nD @ weight_VD.T
                picked_n1 = logits_nV.gather(1, target_n1).float()
                if wants_gradient:
                    # d mean / d logits = (softmax - one-hot) / count where scored
                    scale_n1 = (scored_n / count).unsqueeze(1)
                    lse_n1, grad_nV = softmax(logits_nV, scale_n1)
                    grad_nV.scatter_add_(1, target_n1, -scale_n1.to(dtype))
                    grad_hidden_ND[part] = grad_nV @ weight_VD
                    grad_head_VD += grad_nV.T @ hidden_nD
                else:
                    lse_n1 = logits_nV.float().logsumexp(1, keepdim=True)
                nll_N[part] = (lse_n1 - picked_n1).squeeze(1) * scored_n
        ctx.save_for_backward(grad_hidden_ND, grad_head_VD)
        ctx.head_dtype = head_VD.dtype
        ctx.mark_non_differentiable(nll_N)
        return nll_N.sum() / count, nll_N

    @staticmethod
    def backward(ctx, grad_mean, _):
        grad_hidden_ND, grad_head_VD = ctx.saved_tensors
        return grad_hidden_ND * grad_mean, (grad_head_VD * grad_mean).to(ctx.head_dtype), None, None, None, None
