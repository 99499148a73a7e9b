"""A forward of an unmodified model with a `StreamingCache`: checked, cut into pieces, each with its positions and mask.

`sinkmodel.cache.hook` hands the forward over. The model, its config and its attention implementation stay as they are.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkmodel.cache.families import sample_of, signature, traits_of
from sinkmodel.cache.hook import passed_over, uncompiled
from sinkmodel.cache.inputs import (
    BOOLEAN,
    Request,
    bound,
    check_ids,
    check_inputs,
    request_of,
    tokens_of,
    valid_columns,
)
from sinkmodel.cache.pieces import Piece, plan
from sinkmodel.errors import UserError
from sinkmodel.sinks import kind_of

if TYPE_CHECKING:
    from sinkmodel.cache.streaming_cache import StreamingCache

LONGEST_JOINED = 512  # queries of one joined piece; shorter where each brings many sinks along


@passed_over
def feed(
    cache: StreamingCache, forward: Callable[..., Any], model: Any, args: tuple, kwargs: dict[str, Any], compiling: bool
) -> Any:
    """What `model(...)` gives with this cache: the same as token by token."""
    request = _admit(cache, forward, model, args, kwargs)
    with_mask = compiling or model.config._attn_implementation not in BOOLEAN
    outputs: list[Any] = []
    done = 0  # columns that have been through the model
    try:
        while (inputs := _begin(cache, model, request, done, with_mask)) is not None:
            with torch.no_grad():  # keys are kept without gradients, so what came through them would be wrong
                outputs.append(forward(model, **inputs))
            done = _end(cache, request, done)
    finally:
        cache.piece = None  # of a forward that was broken off: it is as if never fed, unless the cache is torn
    return _joined(outputs, request)


@uncompiled
def _admit(
    cache: StreamingCache, forward: Callable[..., Any], model: Any, args: tuple, kwargs: dict[str, Any]
) -> Request:
    """The input of a forward, after everything that could be wrong with it; the cache has its slots."""
    inputs = bound(forward, model, args, kwargs)
    name, tokens = tokens_of(inputs)
    mask = inputs.pop("attention_mask", None)
    _check(cache, model, tokens, inputs)
    instead = "sinkmodel.streaming.Stream(batch=...), whose ended rows take nothing"
    valid_BT = valid_columns(mask, tokens, cache.columns, cache.seen, type(cache).__name__, instead)
    traits = cache.traits or traits_of(model, functools.partial(forward, model), cache.slots)
    if name == "input_ids":
        check_ids(traits.vocabulary, tokens)
    if cache.traits is None or len(tokens) != len(cache.seen):
        cache.adopt(traits, len(tokens), sample_of(model))
        cache.model = weakref.ref(model)
    return request_of(name, tokens, valid_BT, inputs, model)


# -------------------------------------------------------------------------------------------------------- one piece


def _length(cache: StreamingCache, left: int) -> int:
    """How many tokens the next piece has: all that fit without eviction, then as many as see nearly the same window."""
    room = cache.slots - max(cache.seen)
    if room > 0:
        return min(left, room)
    if cache.ring.ordered:
        return 1
    assert cache.traits is not None
    brought = 0 if cache.ring.text else cache.sinks  # sinks at turns of their own, by each query
    most = min(LONGEST_JOINED, max(16, cache.slots // (brought + 1)))
    most = min(most, cache.ring.window, cache.traits.reach(cache.slots) - cache.ring.window)
    return min(left, max(1, most))


@uncompiled
def _begin(cache: StreamingCache, model: Any, request: Request, start: int, with_mask: bool) -> dict[str, Any] | None:
    """The model's input for the next piece, and the cache ready for it; None when all is done."""
    assert cache.traits is not None
    left = request.tokens.shape[1] - start
    if left == 0:
        return None
    columns = _length(cache, left)
    reach = cache.traits.reach(cache.slots)
    late = [seen - origin + columns > reach for seen, origin in zip(cache.seen, cache.origin)]
    cache.torn = True  # until all keys agree again
    if any(late):
        cache.move_origin([seen if far else old for seen, old, far in zip(cache.seen, cache.origin, late)])
    end = start + columns
    valid = None if request.valid_BT is None else request.valid_BT[:, start:end]
    piece = plan(cache.ring, cache.seen, cache.origin, columns, valid, with_mask, cache.traits.device)
    if piece.delta_B is not None:
        cache.turn_sinks(piece.delta_B)
    cache.piece = piece
    cache.torn = piece.delta_B is None  # a joined piece overwrites keys that a shorter one would still want
    inputs = {
        request.name: request.tokens[:, start:end],
        "position_ids": piece.positions_BN,
        "attention_mask": _mask(piece, model),
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": request.keep if columns == request.tokens.shape[1] else _kept(request.keep, left - columns),
    }
    others = {name: _cut(x, request, start, end) for name, x in request.others.items()}
    if kind_of(model.config) == "kv_bias":
        others["sink_turn"] = cache.query_turn(columns)
    return {**others, **{name: x for name, x in inputs.items() if name in cache.traits.accepts}}


@uncompiled
def _end(cache: StreamingCache, request: Request, start: int) -> int:
    """Where the next piece starts."""
    assert cache.piece is not None
    end = start + cache.piece.positions_BN.shape[1]
    cache.torn = True  # until all is noted
    valid = None if request.valid_BT is None else request.valid_BT[:, start:end]
    if valid is not None and not bool(valid.all()):
        last = (~valid).any(dim=0).nonzero().max().item()
        cache.padded_until = cache.columns + int(last) + 1
    new_sinks = min(cache.seen) < cache.sinks
    cache.columns += end - start
    cache.seen = cache.piece.seen
    cache.piece = None
    if new_sinks:
        cache.remember_sinks()
    cache.torn = False
    return end


def _cut(x: Any, request: Request, start: int, end: int) -> Any:
    """The part of this piece of an input with something for each token, such as token_type_ids."""
    return x[:, start:end] if isinstance(x, Tensor) and x.shape[:2] == request.tokens.shape[:2] else x


def _mask(piece: Piece, model: Any) -> Tensor | None:
    """As the attention implementation takes it: True where seen (sdpa), or 0 and the lowest number (eager)."""
    if piece.mask is None or model.config._attn_implementation in BOOLEAN:
        return piece.mask
    lowest = torch.finfo(model.dtype).min
    return torch.zeros(piece.mask.shape, dtype=model.dtype, device=piece.mask.device).masked_fill_(~piece.mask, lowest)


def _kept(keep: int | Tensor, behind: int) -> int:
    """Logits to keep of a piece with `behind` tokens after it: those that are wanted, at least one; or all of them."""
    return max(1, keep - behind) if isinstance(keep, int) and keep else 0


@uncompiled
def _joined(outputs: list[Any], request: Request) -> Any:
    """One output of many: logits and hidden states in a row."""
    whole = outputs[-1]
    if len(outputs) > 1:
        logits = torch.cat([output.logits for output in outputs], dim=1)
        keep = request.keep
        whole.logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]  # −0 takes all
        if whole.get("hidden_states") is not None:
            whole.hidden_states = tuple(torch.cat(x, dim=1) for x in zip(*(o.hidden_states for o in outputs)))
    return whole.to_tuple() if request.as_tuple else whole


def _check(cache: StreamingCache, model: Any, tokens: Any, inputs: dict[str, Any]) -> None:
    """UserError for what does not go on the stream. Nothing has been written yet."""
    if cache.model is not None and cache.model() is not model:
        raise UserError("this StreamingCache holds the stream of another model; make one a model, or reset() it")
    if cache.model is None and signature(model.config.get_text_config()) != signature(cache.config):
        raise UserError(
            f"this StreamingCache was made for another model: {_differences(cache, model)}; use model.config"
        )
    check_inputs(type(cache).__name__, model, tokens, inputs, cache.columns, len(cache.seen))
    if cache.torn:
        raise UserError("an earlier forward was broken off while it was writing; reset() the stream or restore it")


def _differences(cache: StreamingCache, model: Any) -> str:
    ours, theirs = signature(cache.config), signature(model.config.get_text_config())
    return ", ".join(f"{key} {ours[key]} against {theirs[key]}" for key in ours if ours[key] != theirs[key])
