"""The attention of one layer as a memory observes it, and the numbers that methods compute from it.

The model computes its attention as usual. Beside it, methods compute the few numbers that they need from the queries:
the attention of the last queries (one block [w, K]), or the sum of the attention to each key (block by block). No
matrix of size N × N is ever made.

Shapes: B rows, H query heads in G groups of R = H/G, N queries, K keys, D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sinkmodel.softmax_sinks.scores import sink_scores

# Attention weights in one block. On a CPU, a block that fits into the processor's cache is twice as fast.
BLOCK_NUMBERS = {"cpu": 2**19, "cuda": 2**24}


@dataclass
class Observation:
    """The attention of N queries that were just computed in one layer."""

    module: Any  # the attention module
    query_BHND: Tensor  # after RoPE
    keys_BGKD: Tensor  # all keys that the queries can see, their own at the end
    values_BGKV: Tensor
    full_BK: Tensor | None  # False for empty slots; or [B, G, K], by head; None: no slot is empty
    places_BN: Tensor | None  # the model's position of each query
    valid_BN: Tensor | None  # False for pads; None: there are none
    scale: float
    softcap: float | None = None
    sink_BHN: Tensor | None = None  # scores of a sink in the softmax; None: computed from the module when needed

    def last(self, count: int) -> Observation:
        """The same for the last `count` queries."""
        if count >= self.query_BHND.shape[2]:
            return self
        return replace(
            self,
            query_BHND=self.query_BHND[:, :, -count:],
            places_BN=None if self.places_BN is None else self.places_BN[:, -count:],
            valid_BN=None if self.valid_BN is None else self.valid_BN[:, -count:],
        )

    def of_rows(self, rows: list[int]) -> Observation:
        """The same for some rows of the batch."""
        return replace(
            self,
            query_BHND=self.query_BHND[rows],
            keys_BGKD=self.keys_BGKD[rows],
            values_BGKV=self.values_BGKV[rows],
            full_BK=None if self.full_BK is None else self.full_BK[rows],
            places_BN=None if self.places_BN is None else self.places_BN[rows],
            valid_BN=None if self.valid_BN is None else self.valid_BN[rows],
        )

    def of_head(self, group: int, first: int) -> Observation:
        """The same for the query heads of one KV head, and its slots from `first` on."""
        R = self.query_BHND.shape[1] // self.keys_BGKD.shape[1]
        heads, one = slice(group * R, (group + 1) * R), slice(group, group + 1)
        full, sink = self.full_BK, self._sink(0, self.query_BHND.shape[2])
        if full is not None:
            full = full[:, group, first:] if full.dim() == 3 else full[:, first:]
        return replace(
            self,
            query_BHND=self.query_BHND[:, heads],
            keys_BGKD=self.keys_BGKD[:, one, first:],
            values_BGKV=self.values_BGKV[:, one, first:],
            full_BK=None if full is None or bool(full.all()) else full,
            sink_BHN=None if sink is None else sink[:, heads],
        )

    def group_means(self, start: int, end: int, output_BNHV: Tensor | None = None) -> Tensor:
        """The attention of the queries [start, end), averaged over each group: [B, G, end − start, seen] in fp32.

        `seen` excludes the keys after the last of these queries. If `output_BNHV` is given, the attention's output for
        these queries is written to it.
        """
        G, seen = self.keys_BGKD.shape[1], self.keys_BGKD.shape[2] - self.query_BHND.shape[2] + end
        keys_BGDK = self.keys_BGKD[:, :, :seen].transpose(-1, -2)
        weights_BGRNK = self._weights(start, end, keys_BGDK).unflatten(1, (G, -1))
        if output_BNHV is not None:
            values_BGKV = self.values_BGKV[:, :, :seen]
            outputs = torch.matmul(weights_BGRNK.flatten(2, 3).to(values_BGKV.dtype), values_BGKV)
            output_BNHV[:, start:end] = outputs.unflatten(2, (-1, end - start)).flatten(1, 2).transpose(1, 2)
        return weights_BGRNK.mean(dim=2)

    def weights(self) -> Tensor:
        """The attention of all queries to all keys, [B, H, N, K] in fp32. Rows of pads are 0.

        Each other row sums to 1, or to less if the model has a sink in its softmax.
        """
        return self._weights(0, self.query_BHND.shape[2], self.keys_BGKD.transpose(-1, -2))

    def column_sums(self) -> Tensor:
        """The sum of the attention to each key over all queries, [B, H, K] in fp32."""
        B, H, N, _ = self.query_BHND.shape
        K = self.keys_BGKD.shape[2]
        if N == 1:
            return self.weights()[:, :, 0]
        sums = torch.zeros(B, H, K, device=self.query_BHND.device)
        numbers = BLOCK_NUMBERS.get(self.query_BHND.device.type, BLOCK_NUMBERS["cuda"])
        keys_BGDK = self.keys_BGKD.transpose(-1, -2).contiguous()  # every block reads it
        buffer = torch.empty(max(numbers, B * H * K), dtype=self.query_BHND.dtype, device=self.query_BHND.device)
        start = 0
        while start < N:
            before = K - N + start  # number of keys that all queries of the block see
            # The largest n for which n · (before + n) weights fit, since these n queries see no later keys.
            most = (math.isqrt(before**2 + 4 * numbers // (B * H)) - before) // 2
            end = min(N, start + max(1, most))
            seen = K - N + end
            sums[:, :, :seen] += self._weights(start, end, keys_BGDK[..., :seen], buffer).sum(dim=2)
            start = end
        return sums

    def _weights(self, start: int, end: int, keys_BGDK: Tensor, buffer: Tensor | None = None) -> Tensor:
        """[B, H, end − start, K']: the attention of queries [start, end) to the first K' keys, in `buffer` if given."""
        query = self.query_BHND[:, :, start:end]
        B, H, n, D = query.shape
        G, seen = keys_BGDK.shape[1], keys_BGDK.shape[3]
        exact = query.dtype in (torch.float32, torch.float64)  # otherwise, scaling before the product would round twice
        grouped = (query * self.scale if exact else query).reshape(B, G, -1, D)
        out = None if buffer is None else buffer[: B * H * n * seen].view(B, G, -1, seen)
        scores = torch.matmul(grouped, keys_BGDK, out=out).float().view(B, H, n, seen)
        if not exact:
            scores *= self.scale
        if self.softcap is not None:
            scores = (scores / self.softcap).tanh_().mul_(self.softcap)
        first = self.keys_BGKD.shape[2] - self.query_BHND.shape[2] + start  # the key of the first of these queries
        if n > 1:
            later = torch.ones(n, seen - first, dtype=torch.bool, device=query.device).triu(1)
            scores[..., first:].masked_fill_(later, float("-inf"))
        if self.full_BK is not None:
            full = self.full_BK[:, None] if self.full_BK.dim() == 2 else self.full_BK  # [B, 1 or G, K]
            scores.unflatten(1, (G, -1)).masked_fill_(~full[:, :, None, None, :seen], float("-inf"))
        sink = self._sink(start, end)
        if sink is None:
            weights = torch.softmax(scores, dim=-1, out=scores)
        else:
            total = torch.logaddexp(scores.logsumexp(dim=-1), sink)
            weights = (scores - total[..., None]).exp_()
        if self.valid_BN is not None:
            weights.masked_fill_(~self.valid_BN[:, None, start:end, None], 0.0)
        return weights

    def _sink(self, start: int, end: int) -> Tensor | None:
        if self.sink_BHN is not None:
            return self.sink_BHN[:, :, start:end]
        return sink_scores(self.module, self.query_BHND[:, :, start:end], self.scale)
