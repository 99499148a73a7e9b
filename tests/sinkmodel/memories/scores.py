"""Scores of a prompt's tokens, in loops: SnapKV, GemFilter, ExpectedAttention (for `reference.py`).

Settings are those of `reference.DEFAULTS`. H query heads, G KV heads, N prompt tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

JOIN: dict[str, Callable[[list[float]], float]] = {"mean": fmean, "sum": sum, "max": max}


def snapkv(attention: list[list[list[float]]], sets: list[list[int]], settings: dict[str, Any]) -> list[list[float]]:
    """Scores [set][N] of attention [H][N][N]; the last w columns have none of their own (0).

    Each query head: the sum of the last w rows, without the last w columns, is pooled. Then the heads of a set are
    joined.
    """
    count, window = len(attention[0]), settings["window"]
    if count <= window:
        return [[0.0] * count for _ in sets]
    pooled = []
    for rows in attention:
        sums = [sum(row[j] for row in rows[count - window :]) for j in range(count - window)]
        pooled.append(pool(sums, settings["kernel"], settings["pooling"]))
    join = JOIN.get(settings["group"], JOIN["mean"])  # "as_published": sets of one
    return [[join([pooled[h][j] for h in heads]) for j in range(count - window)] + [0.0] * window for heads in sets]


def pool(x: list[float], kernel: int, kind: str) -> list[float]:
    """Stride 1, kernel // 2 beyond each end: zeros for "avg", which count; nothing for "max"."""
    assert kernel % 2 == 1
    near = [x[max(0, j - kernel // 2) : j + kernel // 2 + 1] for j in range(len(x))]
    return [max(some) if kind == "max" else sum(some) / kernel for some in near]


def gemfilter(query: Tensor, keys: Tensor, settings: dict[str, Any]) -> dict[int, float]:
    """Position → score: the last query [H, D] times keys [G, N, D], not scaled, summed over query heads, pooled."""
    shared = len(query) // len(keys)
    sums = [sum(float(query[h] @ keys[h // shared, j]) for h in range(len(query))) for j in range(keys.shape[1])]
    return dict(enumerate(pool(sums, settings["kernel"], settings["pooling"])))


def expected_attention(
    queries: Tensor, keys: Tensor, values: Tensor, future: Tensor, scaling: float, settings: dict[str, Any]
) -> list[list[float]]:
    """Scores [G][N] of queries [H, N, D] before RoPE, keys [G, N, D] after it, and the averaged rotation [D, D].

    As kvpress 0.5.5 does it (expected_attention_press.py): the first n_sink tokens are left out of everything, of the
    statistics of the queries and of the softmax over keys. With n = N − n_sink others, for each query head: mean μ,
    covariance Σ = Σ_i (q_i − μ)(q_i − μ)ᵀ / n (not n − 1); then μ' = Rμ, Σ' = RΣRᵀ, with R the mean of the rotations at
    positions N … N + n_future_positions − 1. Score = softmax_j(μ'·k_j/√D + ½ k_jᵀΣ'k_j/D) over the n keys, mean over
    the group, plus ε, times the length of v_j. The first n_sink are given the largest score + 1: they always stay.
    """
    first, shared = settings["n_sink"], len(queries) // len(keys)
    if keys.shape[1] <= first:
        return [[0.0] * keys.shape[1] for _ in keys]
    scores = []
    for g, (key, value) in enumerate(zip(keys[:, first:], values[:, first:])):
        probabilities = []
        for q in queries[g * shared :, first:][:shared]:
            mean = q.mean(0)
            covariance = (q - mean).T @ (q - mean) / len(q)
            logits = scaling * key @ (future @ mean)
            if settings["use_covariance"]:
                spread = future @ covariance @ future.T
                logits = logits + torch.stack([k @ spread @ k for k in key]) * scaling**2 / 2
            probabilities.append(torch.softmax(logits, dim=0).tolist())
        joined = torch.tensor([JOIN[settings["group"]](list(x)) for x in zip(*probabilities)], dtype=torch.float64)
        if settings["use_vnorm"]:
            joined = (joined + settings["epsilon"]) * value.norm(dim=-1)
        scores.append([float("inf")] * first + joined.tolist())
    return scores
