"""What every memory makes of one prompt through `generate`: for the same process, and for one with transformers 4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sinkmodel.memories import MEMORIES, NAMM, Scored, make_memory
from sinkmodel.memories.namm import NAMMConfig
from tests.models import build, tokens

FAMILIES = ("llama", "gpt_neox")
PROMPT, AFTER, PADS, BUDGET = 24, 6, 5, 10
EVOLVED = NAMMConfig(window=4, hop=2, interval=6, hidden=3, age_size=2, mean=(0.02,) * 3, variance=(0.0003,) * 3)


def outcomes(family: str, weights: list[Tensor]) -> dict[str, dict[str, Any]]:
    """By memory: the ids of two rows, one of them padded, their logits [AFTER, 2, V], and what is held at the end.

    The weights come in the order of `model.parameters()`; their names are not the same in every transformers.
    """
    model = build(family)
    for ours, given in zip(model.parameters(), weights, strict=True):
        assert ours.shape == given.shape
        ours.data = given
    return {name: outcome(model, name) for name in (*MEMORIES, "scored")}


def outcome(model: Any, name: str) -> dict[str, Any]:
    memory = memory_of(model, name)
    ids = torch.tensor([tokens(PROMPT), tokens(PROMPT, seed=1)])
    mask = torch.ones_like(ids)
    mask[0, :PADS] = 0
    made = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=memory,
        max_new_tokens=AFTER,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return {
        "ids": made.sequences,
        "logits": torch.stack(made.logits),
        "kept": [[memory.kept_positions(layer, row) for row in (0, 1)] for layer in range(len(memory.layers))],
        "columns": memory.columns,
    }


def memory_of(model: Any, name: str) -> Any:
    if name == "scored":
        return Scored(model, lambda module, hidden, keys, *rest: keys.norm(dim=-1), BUDGET)
    if name == "namm":
        parameters = torch.randn(EVOLVED.parameters, generator=torch.Generator().manual_seed(3))
        return NAMM(model, EVOLVED, parameters)
    settings = {"window": 3} if name == "snapkv" else {}
    return make_memory(name, model, None if name == "dense" else BUDGET, **settings)
