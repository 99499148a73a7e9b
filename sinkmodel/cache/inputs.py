"""The inputs of a forward: name them, refuse what our caches cannot do, cut them into pieces, and join the outputs.

Shapes: B rows, T new tokens, E the hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkmodel.errors import UserError
from sinkmodel.sinks import SINK_ATTENTION

BOOLEAN = ("sdpa", SINK_ATTENTION)  # implementations that take a boolean mask, or none
ATTENTION = (*BOOLEAN, "eager")
MASKLESS = ("flash_attention_2", "flash_attention_3")  # causal up to the last key; these take no mask
SETTLED = ("past_key_values", "position_ids", "cache_position", "use_cache")  # the cache sets these
NOT_GIVEN = ("labels", "output_attentions", "output_router_logits")  # refused, because one forward may become several


@dataclass(frozen=True)
class Request:
    """The checked input of one forward."""

    name: str  # input_ids or inputs_embeds
    tokens: Tensor  # [B, T] ids or [B, T, E]
    valid_BT: Tensor | None  # on the host, False for pads; None: there are none
    keep: int | Tensor  # logits_to_keep
    as_tuple: bool  # return_dict=False
    others: dict[str, Any]  # the other arguments, unchanged


def bound(forward: Callable[..., Any], model: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `forward(model, *args, **kwargs)` by name, without those that the cache sets itself."""
    inputs = dict(kwargs)
    if args:
        inputs |= list(zip(inspect.signature(forward).parameters, (model, *args)))[1:]
    if inputs.get("use_cache") is False:
        raise UserError("use_cache=False feeds the whole text again at every step; pass use_cache=True")
    for name in SETTLED:
        inputs.pop(name, None)
    return inputs


def tokens_of(inputs: dict[str, Any]) -> tuple[str, Any]:
    """Remove the tokens from bound inputs; returns "input_ids" and ids, or "inputs_embeds" and embeddings."""
    name = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
    return name, inputs.pop(name, None)


def request_of(name: str, tokens: Tensor, valid_BT: Tensor | None, inputs: dict[str, Any], model: Any) -> Request:
    """The request of a forward, from its checked tokens and its remaining inputs."""
    others = dict(inputs)
    keep, wanted = others.pop("logits_to_keep", None), others.pop("return_dict", None)
    as_tuple = not (getattr(model.config, "return_dict", True) if wanted is None else wanted)
    return Request(name, tokens, valid_BT, 0 if keep is None else keep, as_tuple, {**others, "return_dict": True})


def check_inputs(
    cache: str,
    model: Any,
    tokens: Any,
    inputs: dict[str, Any],
    columns: int,
    rows: int,
    attention: tuple[str, ...] = ATTENTION,
) -> None:
    """Raise UserError for inputs that none of our caches supports.

    Args:
        cache: name of the cache's class, for messages.
        tokens: should be ids [B, T] or embeddings [B, T, E]; checked here.
        inputs: the other inputs by name, from `bound`.
        columns: columns that the cache has been fed, pads included.
        rows: rows that it holds; ignored while `columns` is 0.
        attention: attention implementations that the cache supports.
    """
    if not isinstance(tokens, Tensor) or tokens.dim() < 2 or 0 in tokens.shape:
        raise UserError("a stream takes input_ids [rows, tokens] with at least one of each")
    for name in NOT_GIVEN:
        asked = inputs[name] if inputs.get(name) is not None else getattr(model.config, name, False)
        if asked is not None and asked is not False:
            raise UserError(f"{name} is not available with a {cache}; use the logits")
    if model.config._attn_implementation not in attention:
        raise UserError(
            f"attn_implementation {model.config._attn_implementation!r} cannot take the mask of a {cache}; "
            f"use model.set_attn_implementation({ATTENTION[0]!r})"
        )
    if columns and len(tokens) != rows:
        raise UserError(
            f"the {cache} has {rows} rows and was fed {len(tokens)}; it holds {columns} tokens of each row, and rows "
            "cannot be added or removed: call reset() on the cache to start from the beginning"
        )
    if model.training:
        raise UserError("the model is in training mode, with its dropout on; call model.eval() first")


def check_ids(vocabulary: int, tokens: Tensor) -> None:
    """Raise UserError for ids that the model has no row for.

    A single token on an accelerator is not checked, because reading it would wait for the device.
    """
    if tokens.dtype not in (torch.int64, torch.int32):
        raise UserError(f"input_ids must be token ids, whole numbers; these are {tokens.dtype}")
    if tokens.device.type != "cpu" and tokens.shape[1] == 1:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise UserError(f"the input has the id {low if low < 0 else high}, and the model has ids 0 to {vocabulary - 1}")


def valid_columns(
    mask: Any, tokens: Tensor, columns: int, seen: list[int], cache: str, instead: str = ""
) -> Tensor | None:
    """Which of the new tokens are not pads, [B, T] bool on the host; None if all of them are text.

    Args:
        mask: the given `attention_mask` [B, T … columns + T], or None. Its last T columns are the new tokens, those
            before them were fed earlier. Raises UserError if it hides more of the earlier ones than were pads then.
        columns: columns that the cache has been fed, pads included.
        seen: tokens that each row has been fed, without pads.
        cache: name of the cache's class, for messages.
        instead: an alternative to suggest if the mask hides tokens too late; empty for none.
    """
    if mask is None:
        return None
    T = tokens.shape[1]
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not T <= mask.shape[1] <= columns + T:
        raise UserError(
            f"a {cache} makes the attention mask itself; give a 2-D attention_mask with 0 for each pad, as "
            "long as the new tokens or as all tokens so far, or none"
        )
    if len(mask) != len(tokens):
        raise UserError(f"attention_mask has {len(mask)} rows, the input {len(tokens)}; give one for each row")
    # Count on the mask's device and copy once: every read from the host waits for the device.
    hidden_B1 = (mask[:, :-T] == 0).sum(dim=1, keepdim=True)
    on_host = torch.cat([hidden_B1, mask[:, -T:] != 0], dim=1).cpu()
    for row, (hidden, fed) in enumerate(zip(on_host[:, 0].tolist(), seen)):
        if hidden > (pads := columns - fed):
            raise UserError(
                f"the attention_mask hides {hidden - pads} of the tokens that row {row} already holds, and a {cache} "
                f"cannot remove them; mask pads in the forward that feeds them{instead and ', or use '}{instead}"
            )
    valid = on_host[:, 1:].bool()
    return None if bool(valid.all()) else valid


def piece_of(
    request: Request, start: int, end: int, settled: dict[str, Any], accepts: frozenset[str]
) -> dict[str, Any]:
    """The model's inputs for the columns [start, end) of a request, by the names of its forward's arguments.

    Args:
        settled: inputs that the cache sets itself, such as positions.
        accepts: argument names of the forward. Tokens and settled inputs with any other name are left out.

    Raises UserError if images come with only a part of the tokens that stand for them.
    """
    T = request.tokens.shape[1]
    images = next((name for name, x in request.others.items() if name.startswith("pixel_") and x is not None), None)
    if images is not None and end - start < T:
        raise UserError(
            f"{images} belongs to all {T} tokens, and this cache reads {end - start} of them first; put the features "
            "of the images into inputs_embeds"
        )
    keep: Any = request.keep
    if end - start < T:  # of a piece: the wanted logits, at least one, or all
        keep = max(1, keep - (T - end)) if isinstance(keep, int) and keep else 0
    inputs = {request.name: request.tokens[:, start:end], "logits_to_keep": keep, **settled}
    shape = request.tokens.shape[:2]
    others = {  # inputs with one value per token, such as token_type_ids, are cut as well
        name: x[:, start:end] if isinstance(x, Tensor) and x.shape[:2] == shape else x
        for name, x in request.others.items()
    }
    return {**others, **{name: x for name, x in inputs.items() if name in accepts}}


def joined(outputs: list[Any], request: Request) -> Any:
    """Join the outputs of all pieces into one, by concatenating logits and hidden states."""
    whole = outputs[-1]
    if len(outputs) > 1:
        logits = torch.cat([output.logits for output in outputs], dim=1)
        keep = request.keep
        whole.logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]  # −0 takes all
        if whole.get("hidden_states") is not None:
            whole.hidden_states = tuple(torch.cat(x, dim=1) for x in zip(*(o.hidden_states for o in outputs)))
    return whole.to_tuple() if request.as_tuple else whole
