"""The network of a NAMM: an attention head over the tokens of a KV head, then a score for each (paper, section 3).

    q, k, v = split(x @ qkv.weight + qkv.bias)              x [K, F], 25 features per token
    a       = backward attention: a token sees itself and newer ones, scaled by 1/√hidden
    r, m    = split(a @ out.weight + out.bias)              residual and multiplier, F numbers each
    score   = (x · (1 + m) + r) @ score.weight + score.bias

All layers and heads share one set of parameters. Its flat vector has the order of `layout`, each tensor row by row,
[in, out]. If all parameters are zero, every score is 0, which keeps every token.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkmodel.memories.observation import BLOCK_NUMBERS

FUSED = ("cpu",)  # devices on which torch has a fused attention in fp64; on others it makes all weights at once


def layout(features: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors, in the order of the flat vector."""
    return {
        "qkv.weight": (features, 3 * hidden),
        "qkv.bias": (3 * hidden,),
        "out.weight": (hidden, 2 * features),
        "out.bias": (2 * features,),
        "score.weight": (features, 1),
        "score.bias": (1,),
    }


def parameter_count(features: int, hidden: int) -> int:
    return sum(math.prod(shape) for shape in layout(features, hidden).values())


PARAMETERS = parameter_count(25, 32)  # 4,172: the paper's sizes


def split(parameters: Tensor, features: int, hidden: int) -> dict[str, Tensor]:
    """The tensors of a flat vector [P] as views; for one vector per row, [B, P], the tensors begin with B."""
    shapes = layout(features, hidden)
    parts = parameters.split([math.prod(shape) for shape in shapes.values()], dim=-1)
    return {name: part.unflatten(-1, shape) for (name, shape), part in zip(shapes.items(), parts)}


def flatten(tensors: dict[str, Tensor]) -> Tensor:
    """The flat vector [P] of a network's tensors."""
    order = ("qkv.weight", "qkv.bias", "out.weight", "out.bias", "score.weight", "score.bias")
    return torch.cat([tensors[name].flatten() for name in order])


def token_scores(x_BGKF: Tensor, parameters: Tensor, hidden: int) -> Tensor:
    """The score [B, G, K] of each token of each KV head, in the dtype of both arguments.

    Args:
        x_BGKF: features, with tokens in the order of the text. A token's score does not depend on earlier tokens.
        parameters: [P], or [B, P] for one network per row.
        hidden: size of the attention head.
    """
    weights = split(parameters, x_BGKF.shape[-1], hidden)
    q, k, v = _linear(x_BGKF, weights, "qkv").flip(-2).chunk(3, dim=-1)  # newest first: then backward is causal
    seen = _causal(q, k, v).flip(-2)
    residual, multiplier = _linear(seen, weights, "out").chunk(2, dim=-1)
    return _linear(torch.addcmul(residual, x_BGKF, 1 + multiplier), weights, "score")[..., 0]


def _causal(q_BGKD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor) -> Tensor:
    """Causal attention. Without a fused kernel it is computed for some queries at a time, which bounds its memory."""
    if q_BGKD.device.type in FUSED:
        return F.scaled_dot_product_attention(q_BGKD, k_BGKD, v_BGKD, is_causal=True)
    B, G, K, _ = q_BGKD.shape
    block = max(1, BLOCK_NUMBERS.get(q_BGKD.device.type, BLOCK_NUMBERS["cuda"]) // (B * G * K))
    parts = []
    for start in range(0, K, block):
        end = min(K, start + block)
        sees = torch.ones(end - start, end, dtype=torch.bool, device=q_BGKD.device).tril(start)
        keys, values = k_BGKD[:, :, :end], v_BGKD[:, :, :end]
        parts.append(F.scaled_dot_product_attention(q_BGKD[:, :, start:end], keys, values, attn_mask=sees))
    return torch.cat(parts, dim=2)


def _linear(x_BGKF: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    if weight.dim() == 3:  # one network per row
        B, G, K, _ = x_BGKF.shape
        return torch.baddbmm(bias[:, None], x_BGKF.flatten(1, 2), weight).view(B, G, K, -1)
    return F.linear(x_BGKF, weight.T, bias)
