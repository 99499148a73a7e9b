"""Attention maps of an unmodified model, layer by layer and without keeping them. Fused kernels never write them out.

    watch(model, ids_BT, see)       # see(Seen) is called once in every layer, in order

The maps come through transformers' `AttentionInterface`: queries and keys after RoPE, whole rows, every token seeing
all before it. A model that does not call the interface once in every layer, or that requests something unsupported, is
refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.utils import logging

from sinkmodel.attention import requests
from sinkmodel.errors import UserError
from sinkmodel.softmax_sinks.scores import sink_scores

WATCHED = "sinkmodel_watched"


@dataclass
class Seen:
    """One layer's attention in fp32, read-only: B rows, H heads in G groups of shared keys, T places, D."""

    layer: int
    query_BHTD: Tensor
    key_BGTD: Tensor
    value_BGTD: Tensor
    score_BHTT: Tensor  # q · k · scale, before the softmax; −inf for keys after the query
    weights_BHTT: Tensor  # after the softmax; rows sum to 1, or to 1 − sink
    sink_score_BHT: Tensor | None  # score of a sink in the softmax; None if the model has none
    sink_BHT: Tensor | None  # the attention that this sink gets


@torch.no_grad()
def watch(model: Any, ids_BT: Tensor, see: Callable[[Seen], None], **forward: Any) -> Any:
    """Run the decoder's body once over whole rows [B, T] and return its output. Memory: one layer's [B, H, T, T].

    Args:
        see: called with the attention of each layer, in order.
        forward: more arguments for the body, such as `output_hidden_states`.

    Raises UserError for a model that cannot be watched. The model is restored afterwards, also after an error.
    """
    before = model.config._attn_implementation
    layers: list[int] = []

    def noted(seen: Seen) -> None:
        layers.append(seen.layer)
        see(seen)

    depth = model.config.get_text_config().num_hidden_layers
    token = _VISITOR.set(noted)
    try:
        set_attention(model, WATCHED)
        if model.config._attn_implementation == WATCHED:  # else the model did not accept it
            with torch.compiler.set_stance("force_eager"):  # else a compiled body would be compiled again for it
                output = model.base_model(input_ids=ids_BT, use_cache=False, **forward)
    finally:
        set_attention(model, before)
        _VISITOR.reset(token)
    if layers != list(range(depth)):
        raise UserError(
            f"model type {model.config.model_type!r} does not send its attention through transformers' "
            f"AttentionInterface once in every layer ({len(set(layers))} of {depth} did), so it cannot be watched"
        )
    return output


def set_attention(model: Any, name: str) -> None:
    """Change a model's attention. Suppresses transformers' warning if it cannot, since callers check the result."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model.set_attn_implementation(name)
    finally:
        logging.set_verbosity(level)


_VISITOR: ContextVar[Callable[[Seen], None] | None] = ContextVar("sinkmodel_watched", default=None)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The softmax written out, with the sink's column if there is one; [B, T, H, D].

    `s_aux` [H] are the sinks of gpt-oss, one learned score per head. They equal our kind `logit`.
    """
    visitor = _VISITOR.get()
    if visitor is None:
        raise RuntimeError(f"the attention {WATCHED!r} works only inside of watch")
    asked = requests(attention_mask, kwargs)
    asked += [] if getattr(module, "is_causal", True) else ["keys after the query"]
    if sliding_window is not None and sliding_window < query.shape[2]:
        raise UserError(
            f"model type {module.config.model_type!r} has its own sliding window of {sliding_window}, narrower "
            f"than rows of {query.shape[2]} tokens; watch rows of at most {sliding_window}"
        )
    if asked:
        raise UserError(
            f"model type {module.config.model_type!r} asks its attention for {', '.join(asked)}, which is not watched"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = query.float(), key.float(), value.float()
    shared = q.shape[1] // k.shape[1]
    score_BHTT = (q @ k.repeat_interleave(shared, dim=1).transpose(-1, -2)) * scale
    T = q.shape[2]
    score_BHTT.masked_fill_(torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    sink_score_BHT = sink_scores(module, query, scale)
    if sink_score_BHT is None and s_aux is not None:
        sink_score_BHT = s_aux.float()[None, :, None].expand(q.shape[:3])
    if sink_score_BHT is None:
        weights_BHTT, sink_BHT = score_BHTT.softmax(-1), None
    else:
        both = torch.cat([sink_score_BHT[..., None], score_BHTT], dim=-1).softmax(-1)
        sink_BHT, weights_BHTT = both[..., 0], both[..., 1:]
    visitor(Seen(module.layer_idx, q, k, v, score_BHTT, weights_BHTT, sink_score_BHT, sink_BHT))
    out_BTHD = (weights_BHTT @ v.repeat_interleave(shared, dim=1)).transpose(1, 2)
    return out_BTHD.to(query.dtype).contiguous(), None


AttentionInterface.register(WATCHED, _attention)  # with no mask function: transformers then makes no mask
