"""Greedy generation of an answer: the choice of the next token, and the tokens that end a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sinkmodel.tokenizer import suppressed_ids

if TYPE_CHECKING:
    from sinkmodel.loading import LoadedModel


class NextToken:
    """The greedy choice among the tokens that a model may generate. `ends` are the end-of-text tokens."""

    def __init__(self, loaded: LoadedModel):
        model = loaded.model
        rows = model.get_input_embeddings().num_embeddings
        never = [token for token in suppressed_ids(model, loaded.tokenizer) if token < rows]
        self._never_V = torch.zeros(rows, dtype=torch.bool, device=model.device)
        self._never_V[never] = True
        ends = model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, list) else [ends]), loaded.tokenizer.eos_token_id}

    def choose(self, logits_BV: Tensor) -> list[int]:
        """The chosen token of each row."""
        return logits_BV.masked_fill(self._never_V, -torch.inf).argmax(dim=-1).tolist()
