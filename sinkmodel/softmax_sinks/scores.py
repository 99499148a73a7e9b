"""The score of a sink in the softmax, for each query. Every attention function with such a sink takes it from here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sinkmodel.rope import Rotation, turn_half_split
from sinkmodel.sinks import kind_of


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
