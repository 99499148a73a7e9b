"""Attention functions that transformers does not have. Importing this module registers them by name."""

from __future__ import annotations

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CAUSAL = "causal"


def causal_attention(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Rows of whole text, every token seeing all before it: PyTorch's causal kernel, and no mask, ever.

    For training. Under the name `sdpa` transformers 5 looks in every forward whether rows are packed, which waits for
    the device, and once compiled always builds the mask [B, 1, T, T], with which PyTorch's flash kernel cannot be used.
    A name that has no mask function gets none (transformers, masking_utils.py, `_preprocess_mask_arguments`).
    Returns [B, T, H, D]. Raises ValueError where a mask comes all the same.
    """
    if attention_mask is not None:
        raise ValueError("causal attention takes no mask: rows must be whole, without padding")
    kwargs["is_causal"] = True
    return sdpa_attention_forward(module, query_BHTD, key_BGTD, value_BGTD, None, **kwargs)


AttentionInterface.register(CAUSAL, causal_attention)
