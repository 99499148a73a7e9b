"""Attention functions that transformers does not have. Importing this module registers them by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sinkmodel.errors import UserError
from sinkmodel.sinks import IN_SOFTMAX, kind_of
from sinkmodel.softmax_sinks.attention import sink_attention_forward

CAUSAL = "causal"  # for training: whole rows, no mask


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


AttentionInterface.register(CAUSAL, causal_attention)
