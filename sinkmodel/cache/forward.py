"""Run a forward of an unmodified model with a `StreamingCache`: check it, then run it as one or more plans.

`sinkmodel.cache.hook` hands the forward over. The model, its config and its attention implementation stay unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from sinkmodel.cache.hook import passed_over, uncompiled
from sinkmodel.cache.inputs import (
    BOOLEAN,
    Request,
    bound,
    check_ids,
    check_inputs,
    joined,
    piece_of,
    request_of,
    tokens_of,
    valid_columns,
)
from sinkmodel.cache.plan import Plan, next_plan
from sinkmodel.cache.state import State
from sinkmodel.errors import UserError
from sinkmodel.probe import traits_of
from sinkmodel.products import fast_products
from sinkmodel.sinks import kind_of

BATCHED = "sinkmodel.streaming.Stream(batch=...), which feeds nothing to rows that have ended"


@passed_over
def run_forward(
    cache: Cache,
    state: State,
    forward: Callable[..., Any],
    model: Any,
    args: tuple,
    kwargs: dict[str, Any],
    compiling: bool,
) -> Any:
    """The output of `model(*args, **kwargs)` with this cache, equal to feeding token by token."""
    request = _admit(type(cache).__name__, state, forward, model, args, kwargs)
    with_mask = compiling or model.config._attn_implementation not in BOOLEAN
    outputs: list[Any] = []
    done = 0  # columns that the model has processed
    try:
        while done < request.tokens.shape[1]:
            plan = _begin(state, request, done, with_mask)
            inputs = _inputs(cache, state, model, request, done, plan)
            rows = plan.columns * len(state.seen)
            products = nullcontext() if compiling else fast_products(rows=rows)  # the compiler must not try it
            with torch.no_grad(), products:  # keys are stored without gradients, so gradients would be wrong
                outputs.append(forward(model, **inputs))
            _commit(state, plan)
            done += plan.columns
    except BaseException:
        state.abandon()
        raise
    return _joined(outputs, request)


@uncompiled
def _admit(
    cache: str, state: State, forward: Callable[..., Any], model: Any, args: tuple, kwargs: dict[str, Any]
) -> Request:
    """Check the input of a forward, and allocate the slots of the state if necessary."""
    inputs = bound(forward, model, args, kwargs)
    name, tokens = tokens_of(inputs)
    mask = inputs.pop("attention_mask", None)
    state.check_model(model)
    check_inputs(cache, model, tokens, inputs, state.columns, len(state.seen))
    if state.torn:
        raise UserError("an earlier forward was interrupted while it was writing; reset() the stream or restore it")
    valid_BT = valid_columns(mask, tokens, state.columns, state.seen, cache, BATCHED)
    traits = state.traits or traits_of(model, functools.partial(forward, model), state.ring.slots)
    if name == "input_ids":
        check_ids(traits.vocabulary, tokens)
    if state.traits is None or len(tokens) != len(state.seen):
        state.adopt(model, traits, len(tokens))
    return request_of(name, tokens, valid_BT, inputs, model)


@uncompiled
def _begin(state: State, request: Request, done: int, with_mask: bool) -> Plan:
    """Make the next plan, and turn the keys to the positions that it needs."""
    assert state.traits is not None
    left, valid_BT = request.tokens.shape[1] - done, request.valid_BT
    valid_BN = None if valid_BT is None else valid_BT[:, done:]
    plan = next_plan(state.ring, state.seen, state.origin, left, valid_BN, with_mask, state.traits.device)
    state.begin(plan)
    return plan


@uncompiled
def _commit(state: State, plan: Plan) -> None:
    state.commit(plan)


# ------------------------------------------------------------------------------------------------- inputs and outputs


@uncompiled
def _inputs(cache: Cache, state: State, model: Any, request: Request, start: int, plan: Plan) -> dict[str, Any]:
    """The model's inputs for a plan, by the names of its forward's arguments."""
    assert state.traits is not None
    settled = {
        "position_ids": plan.positions_BN,
        "attention_mask": _mask(plan.mask, model),
        "past_key_values": cache,
        "use_cache": True,
    }
    inputs = piece_of(request, start, start + plan.columns, settled, state.traits.accepts)
    if kind_of(model.config) == "kv_bias":
        inputs["sink_turn"] = state.query_turn(plan)
    return inputs


def _mask(mask: Tensor | None, model: Any) -> Tensor | None:
    """The mask as the attention implementation expects it: boolean (sdpa), or 0 and the lowest number (eager)."""
    if mask is None or model.config._attn_implementation in BOOLEAN:
        return mask
    lowest = torch.finfo(model.dtype).min
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill_(~mask, lowest)


_joined = uncompiled(joined)
