"""Check the input of a forward with a memory, and what is asked of it, before anything is written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from sinkmodel.cache.inputs import (
    ATTENTION,
    MASKLESS,
    Request,
    bound,
    check_ids,
    check_inputs,
    request_of,
    tokens_of,
    valid_columns,
)
from sinkmodel.errors import UserError
from sinkmodel.model_support import own_window, signature
from sinkmodel.probe import Traits, sample_of, traits_of


class Reader(Protocol):
    """A memory; its attributes are described in `Memory`."""

    config: Any
    columns: int
    ended: bool
    seen: list[int]
    kept: list[int]
    even: bool
    shift: list[int]
    torn: bool
    model: Any
    sample: list[float]
    traits: Traits | None

    @property
    def name(self) -> str: ...


def admit(
    memory: Reader, forward: Callable[..., Any], model: Any, args: tuple, kwargs: dict[str, Any]
) -> tuple[Request, Traits]:
    """The request of a forward and the traits of its model. Raises UserError if the memory cannot read it."""
    inputs = bound(forward, model, args, kwargs)
    name, tokens = tokens_of(inputs)
    mask = inputs.pop("attention_mask", None)
    attention = (*ATTENTION, *MASKLESS)
    check_inputs(memory.name, model, tokens, inputs, memory.columns, len(memory.seen), attention)
    if memory.torn:
        raise UserError(f"an earlier forward of this {memory.name} was interrupted while it was writing; reset() it")
    if memory.model is not None and memory.model() is not model:
        raise UserError(f"this {memory.name} holds what another model read; make one for each model, or reset() it")
    if memory.model is None and signature(model.config.get_text_config()) != signature(memory.config):
        raise UserError(f"this {memory.name} was made for another model; make it with model.config")
    if memory.traits is None and memory.sample and memory.sample != sample_of(model):
        raise UserError(
            f"this {memory.name} was filled by other weights; continue with the model that it was saved from"
        )
    valid_BT = valid_columns(mask, tokens, memory.columns, memory.seen, memory.name)
    _check_left_padded(memory, valid_BT)
    _check_mask(memory, model.config.get_text_config()._attn_implementation, valid_BT)
    traits = memory.traits or traits_of(model, functools.partial(forward, model), 1)
    if name == "input_ids":
        check_ids(traits.vocabulary, tokens)
    _check_end(memory, tokens.shape[1], traits)
    return request_of(name, tokens, valid_BT, inputs, model), traits


def check_open(memory: Reader) -> None:
    """Raise UserError if the prompt of a memory has ended."""
    if memory.ended:
        raise UserError(f"{memory.name} has compressed a prompt and cannot read a second one; reset() it for another")
    if memory.torn:
        raise UserError(f"an earlier forward of this {memory.name} was interrupted while it was writing; reset() it")


def check_can_end(memory: Reader) -> None:
    """Raise UserError if there is no prompt that could be compressed now."""
    check_open(memory)
    if not memory.columns:
        raise UserError(f"{memory.name} has read no prompt; feed one first")
    if memory.traits is None:
        raise UserError(f"this {memory.name} was restored and its model has not run yet; feed the next token instead")
    if memory.model is not None and memory.model() is None:
        raise UserError(f"the model that this {memory.name} read with no longer exists; reset() it for another")


def check_dtype(memory: Reader, held: torch.dtype, new: torch.dtype) -> None:
    """Raise UserError if keys come in another dtype than those that are held."""
    if new != held:
        raise UserError(
            f"this {memory.name} holds keys in {held} but got {new}; keep the model's dtype and autocast as they "
            "were, or reset() it"
        )


def not_observed(memory: Reader) -> UserError:
    return UserError(
        f"model type {memory.config.model_type!r} does not send its attention through transformers' "
        f"AttentionInterface in every layer, so {memory.name} cannot see it; use a StreamingCache"
    )


def _check_left_padded(memory: Reader, valid_BT: Tensor | None) -> None:
    """Raise UserError if a pad comes after a token of its row."""
    if valid_BT is None:
        return
    begun_B = torch.tensor([n > 0 for n in memory.seen] or [False] * len(valid_BT))
    before_BT = torch.cat([begun_B[:, None], valid_BT[:, :-1]], dim=1)
    if bool((before_BT & ~valid_BT).any()):
        raise UserError(f"{memory.name} takes only left-padded rows, and in one of these a pad follows a token")


def _check_mask(memory: Reader, implementation: str, valid_BT: Tensor | None) -> None:
    """Raise UserError if a mask is needed but the attention implementation takes none."""
    if implementation not in MASKLESS:
        return
    padded = valid_BT is not None and not bool(valid_BT.all())
    if padded or not memory.even or min(memory.kept, default=0) < max(memory.kept, default=0):
        why = "its rows have pads" if memory.even else "its heads keep sets of different sizes"
        raise UserError(
            f"{memory.name} needs an attention mask here, since {why}, and {implementation} takes none; "
            f"use model.set_attn_implementation({ATTENTION[0]!r})"
        )


def _check_end(memory: Reader, new: int, traits: Traits) -> None:
    """Raise UserError if `new` more tokens would exceed the model's positions or its own window."""
    kind, window = memory.config.model_type, own_window(memory.config)
    if window is not None and max(memory.seen, default=0) + new > window:
        raise UserError(
            f"model type {kind!r} has its own window of {window} in some layers, and the text is longer; "
            f"{memory.name} needs a model that sees all of it"
        )
    of_rotary = traits.rotary.limit if traits.rotary is not None else None
    limits = (getattr(memory.config, "max_position_embeddings", None), of_rotary)
    limit = min((n for n in limits if n is not None), default=None)
    end = max((n - shift for n, shift in zip(memory.seen, memory.shift)), default=0) + new
    if limit is not None and end > limit:
        raise UserError(
            f"the text would reach position {end - 1}, but the positions of this {kind} end at {limit - 1}; give less "
            'text, or use positions="cache", which renumbers the kept tokens after the prompt'
        )
