"""Attention functions that transformers does not have. Importing this module registers them by name.

A sink that is not a token is one more column of every softmax, with its own score s and a value of zero. For a query
with scores S_j = q·k_j·scale, the output is

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
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from sinkmodel.errors import UserError
from sinkmodel.rope import Rotation, turn_half_split
from sinkmodel.sinks import IN_SOFTMAX, SINK_ATTENTION, kind_of

CAUSAL = "causal"  # for training: whole rows, no mask

aten = torch.ops.aten


def causal_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention over whole rows, in which every token sees all before it. Never makes a mask.

    For training. Under the name `sdpa`, transformers 5 checks in every forward whether rows are packed, which waits for
    the device. Once compiled, it always builds the mask [B, 1, T, T], with which PyTorch's flash kernel cannot be used.
    A name without a mask function gets no mask (transformers, masking_utils.py, `_preprocess_mask_arguments`).

    Takes [B, H or G, T, D], returns [B, T, H, D]. Raises ValueError if there is a mask nevertheless, and UserError if
    the model requests something that would be ignored, such as a window narrower than the row.
    """
    if attention_mask is not None:
        raise ValueError("causal attention takes no mask: rows must be whole, without padding")
    if kind_of(module.config) in IN_SOFTMAX:
        return sink_attention_forward(module, query, key, value, None, scaling, dropout, **kwargs)
    kind = module.config.model_type
    if sliding_window is not None and sliding_window < query.shape[2]:
        raise UserError(
            f"model type {kind!r} has its own sliding window of {sliding_window}, narrower than rows of "
            f"{query.shape[2]} tokens; train on rows of at most {sliding_window}"
        )
    asked = requests(None, kwargs) + ([] if getattr(module, "is_causal", True) else ["keys after the query"])
    if asked:
        raise UserError(
            f"model type {kind!r} asks its attention for {', '.join(asked)}, which training does not have; "
            "choose another model"
        )
    return sdpa_attention_forward(module, query, key, value, None, dropout=dropout, scaling=scaling, is_causal=True)


# Arguments that transformers passes and that can be ignored. Any other that is set is a request that we do not support.
HARMLESS = {
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits",
    "position_ids", "cache_position", "position_embeddings", "is_causal", "past_key_values", "past_key_value",
}  # fmt: skip


def requests(attention_mask: Tensor | None, others: dict[str, Any]) -> list[str]:
    """Names of the requests that our attention functions do not support."""
    asked = [name for name, x in others.items() if name not in HARMLESS and x is not None and x is not False]
    return asked + ["attention_mask"] * (attention_mask is not None)


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


def sink_scores(module: Any, query_BHTD: Tensor, scale: float, turn: Rotation | None = None) -> Tensor | None:
    """The sink's score s [B, H, T] for each query, scaled, in fp32; None if the module has no such sink.

    `zero`: 0. `logit`: one number per head. `kv_bias`: q · k · scale. Its k was never rotated, so it is at position 0.
    In a stream the queries' places differ from the positions of their rotation, so `turn` rotates them to their places.
    """
    kind = kind_of(module.config)
    if kind == "zero":
        return query_BHTD.new_zeros((), dtype=torch.float32).expand(query_BHTD.shape[:3])
    if kind == "logit":
        return module.sink.float()[None, :, None].expand(query_BHTD.shape[:3])
    if kind == "kv_bias":
        key_GD = module.sink.float()
        key_H1D = key_GD.repeat_interleave(query_BHTD.shape[1] // len(key_GD), dim=0)[:, None]
        query = query_BHTD.float() if turn is None else turn_half_split(query_BHTD, turn)
        return (query * key_H1D).sum(-1) * scale  # not a matrix product, which autocast would round
    return None


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


AttentionInterface.register(CAUSAL, causal_attention)
AttentionInterface.register(SINK_ATTENTION, sink_attention_forward)
AttentionMaskInterface.register(SINK_ATTENTION, sdpa_mask)
