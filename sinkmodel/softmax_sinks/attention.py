"""Attention with one more column in every softmax, from PyTorch's fused kernels. Importing this registers it by name.

The column is the sink: it has its own score s and a value of zero. For a query with scores S_j = q·k_j·scale, the
output is

    y = Σ_j e^S_j v_j / (e^s + Σ_j e^S_j) = o · e^(lse − lse'),    lse' = log(e^lse + e^s)

Here o and lse = log Σ_j e^S_j are what PyTorch's fused kernels compute without the sink. Their backward pass derives
probabilities from e^(S − lse) and uses the row sum of dy·o. If it is given lse' and y instead of lse and o, it returns
the exact gradients of q, k and v. The gradient of s is −e^(s − lse') Σ dy·y. So such a sink costs a few operations on
[B, H, T], with no copy and no mask.

Shapes: B rows, H heads in G groups of shared keys, T queries, K keys, D.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from sinkmodel.rope import Rotation
from sinkmodel.sinks import SINK_ATTENTION
from sinkmodel.softmax_sinks.scores import sink_scores

aten = torch.ops.aten


def sink_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sink_turn: Rotation | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of a model with a sink in its softmax, which transformers calls in every layer; [B, T, H, D].

    `sink_turn` is the `turn` of `sink_scores`. Raises ValueError for dropout, which is not supported with such a sink.
    """
    if dropout:
        raise ValueError("attention with a sink in its softmax has no dropout; set attention_dropout to 0")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    score_BHT = sink_scores(module, query, scale, sink_turn)
    if score_BHT is None:
        raise ValueError(f"{type(module).__name__} has no sink in its softmax; use the attention 'sdpa'")
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return attend(query, key, value, score_BHT, attention_mask, scale).transpose(1, 2), None


def attend(q: Tensor, k: Tensor, v: Tensor, score_BHT: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """y [B, H, T, D] for q [B, H, T, D] and k, v [B, H, K, D]. Without a mask and for T > 1: causal from the first key.

    The mask is as for `scaled_dot_product_attention`: boolean with True for visible keys, or additive.
    """
    if torch.is_autocast_enabled(q.device.type):  # autocast does the same for PyTorch's own attention
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    causal = mask is None and q.shape[2] > 1
    square = q.shape[2] == k.shape[2]
    if mask is None and (square or not causal) and _has_kernel(q, v):
        return _Renormalised.apply(q, k, v, score_BHT, causal, scale)
    return _with_column(q, k, v, score_BHT, mask, scale)


def _with_column(q: Tensor, k: Tensor, v: Tensor, score_BHT: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The definition: in front a key of zeros, with its score as bias, and a value of zeros. Copies keys and values."""
    T, K = q.shape[2], k.shape[2]
    if mask is None:
        mask = torch.ones(T, K, dtype=torch.bool, device=q.device).tril() if T > 1 else q.new_zeros(1, 1)
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else mask
    bias_BHTK = torch.cat([score_BHT[..., None].to(q.dtype), bias.expand(*q.shape[:3], K)], dim=-1)
    return F.scaled_dot_product_attention(q, F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0)), bias_BHTK, scale=scale)


# ---------------------------------------------------------------------------------- PyTorch's kernels, renormalised


def _has_kernel(q: Tensor, v: Tensor) -> bool:
    """Whether a fused kernel returns lse here. Sizes are those for which PyTorch itself uses it without padding."""
    device, size = q.device.type, q.shape[-1]
    if size != v.shape[-1]:
        return False
    if device == "cpu":
        return True
    if q.dtype == torch.float32 and torch.compiler.is_compiling():
        return False  # wrong gradients on an H100 (torch 2.11); those of eager fp32 and of bf16 were right
    known = q.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return device == "cuda" and known and size % 8 == 0 and size <= 256


class _Renormalised(torch.autograd.Function):
    """`y` of the module's docstring. The three kernels pass different values to their backward passes."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, score_BHT: Tensor, causal: bool, scale: float | None
    ) -> Tensor:
        T = q.shape[2]
        if q.device.type == "cpu":
            out, lse, *rest = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        elif q.dtype == torch.float32:
            out, lse, *rest = aten._scaled_dot_product_efficient_attention(
                q, k, v, None, True, 0.0, causal, scale=scale
            )
        else:
            out, lse, *rest = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        total_BHT = torch.logaddexp(lse[:, :, :T], score_BHT)  # in fp32, or in fp64 if q is
        out = (out * (lse[:, :, :T] - total_BHT).exp()[..., None]).to(q.dtype)
        ctx.causal, ctx.scale, ctx.padding = causal, scale, lse.shape[2] - T
        ctx.beside = [None if isinstance(x, Tensor) else x for x in rest]  # lengths; RNG tensors are saved below: the
        ctx.random = [i for i, x in enumerate(rest) if isinstance(x, Tensor)]  # backward ops require but ignore them
        ctx.save_for_backward(q, k, v, score_BHT, out, total_BHT, *(rest[i] for i in ctx.random))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, score_BHT, out, total_BHT, *random = ctx.saved_tensors
        causal, scale, beside = ctx.causal, ctx.scale, list(ctx.beside)
        for place, tensor in zip(ctx.random, random):
            beside[place] = tensor
        if q.device.type == "cpu":
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, total_BHT, 0.0, causal, scale=scale
            )
        elif q.dtype == torch.float32:
            lse = F.pad(total_BHT, (0, ctx.padding), value=float("inf"))  # the kernel's length, a multiple of 32
            grads = aten._scaled_dot_product_efficient_attention_backward(
                grad, q, k, v, None, out, lse, *beside, 0.0, [True, True, True, False], causal, scale=scale
            )[:3]
        else:
            from_q, from_k, most_q, most_k, seed, offset, _ = beside
            grads = aten._scaled_dot_product_flash_attention_backward(
                grad, q, k, v, out, total_BHT, from_q, from_k, most_q, most_k, 0.0, causal, seed, offset, scale=scale
            )
        grad_score_BHT = -(score_BHT - total_BHT).exp() * (grad.to(total_BHT.dtype) * out).sum(-1)
        return *grads, grad_score_BHT, None, None


AttentionInterface.register(SINK_ATTENTION, sink_attention_forward)
AttentionMaskInterface.register(SINK_ATTENTION, sdpa_mask)
