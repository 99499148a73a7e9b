"""Choose the next token from the logits: the most likely one, or a sample as in transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sinkmodel.errors import UserError


class Sampler:
    """Greedy if nothing is given or `temperature` is 0; else samples at `temperature`, which is 1 by default.

    Each row samples from its own generator, seeded with `seed` + row, so a row's tokens do not depend on the others.
    The generators keep their state between calls.

    Args:
        temperature: divides the logits; None is 1 if `top_k` or `top_p` is given, else greedy.
        top_k: sample from the `top_k` most likely tokens only; None for no such limit.
        top_p: sample from the most likely tokens whose probabilities sum to `top_p`; None for no such limit.
        seed: of row 0.

    Raises UserError for invalid values.
    """

    def __init__(
        self, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None, seed: int = 0
    ):
        self.greedy = temperature == 0 or (temperature is None and top_k is None and top_p is None)
        if temperature == 0 and (top_k is not None or top_p is not None):
            raise UserError("top_k and top_p have no effect at temperature 0; leave them out, or raise the temperature")
        given: list[tuple[Any, Any]] = [
            (TemperatureLogitsWarper, None if temperature is None else float(temperature)),
            (TopKLogitsWarper, top_k),
            (TopPLogitsWarper, top_p),
        ]
        try:
            warpers = [] if self.greedy else [warper(value) for warper, value in given if value is not None]
        except ValueError as error:
            raise UserError(f"these sampling settings are invalid: {error}") from None
        self.warpers = LogitsProcessorList(warpers)
        self.seed = seed
        self.generators: list[torch.Generator] = []

    @torch.inference_mode()
    def __call__(self, logits_BV: Tensor, wanted_B: Sequence[bool]) -> list[int | None]:
        """A token id for each row that wants one, None for the others."""
        if self.greedy:
            return [token if wanted else None for token, wanted in zip(logits_BV.argmax(dim=-1).tolist(), wanted_B)]
        no_ids = torch.empty(len(logits_BV), 0, dtype=torch.long, device=logits_BV.device)
        probabilities_BV = self.warpers(no_ids, logits_BV).softmax(dim=-1)
        for row in range(len(self.generators), len(logits_BV)):
            self.generators.append(torch.Generator(logits_BV.device).manual_seed(self.seed + row))
        return [
            int(torch.multinomial(p, 1, generator=generator)) if wanted else None
            for p, generator, wanted in zip(probabilities_BV, self.generators, wanted_B)
        ]
