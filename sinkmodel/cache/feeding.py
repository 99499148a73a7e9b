"""A forward of an unmodified model with a `StreamingCache`: checked, cut into pieces, each with its positions and mask.

A cache sees keys only; positions, padding and the mask are settled in the model's forward, before it. So making a
cache wraps `forward` of the class that its config belongs to. The wrapper looks whether `past_key_values` wants to be
fed, and is inert for everything else. The model, its config and its attention implementation stay as they are.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

import sinkmodel.architectures  # noqa: F401  transformers' Auto classes then know our models
from sinkmodel.attention import SINK
from sinkmodel.cache.families import sample_of, signature, traits_of
from sinkmodel.cache.pieces import Piece, plan
from sinkmodel.errors import UserError
from sinkmodel.sinks import kind_of

if TYPE_CHECKING:
    from sinkmodel.cache.streaming_cache import StreamingCache

BOOLEAN = ("sdpa", SINK)  # the implementations that take a mask of ours as True and False, or none
ATTENTION = (*BOOLEAN, "eager")
TAKES_BACK = {  # generation modes that crop the cache, and the arguments that ask for them
    "assisted_generation": "assistant_model, prompt_lookup_num_tokens, assistant_early_exit and use_mtp",
    "contrastive_search": "penalty_alpha",
}
LONGEST_JOINED = 512  # queries of one joined piece; shorter where each brings many sinks along


def attach(model_or_config: Any) -> None:
    """Let the forward of a model's class hand over to `feed` what comes with a StreamingCache; once a class."""
    if isinstance(model_or_config, PreTrainedModel):
        model_class = type(model_or_config)
        if model_or_config.get_output_embeddings() is None:
            raise UserError(f"{model_class.__name__} gives no logits; give a causal language model or its config")
    else:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_or_config), None)
    if model_class is None:
        raise UserError(
            f"transformers has no causal language model for a {type(model_or_config).__name__}; "
            "give the config of one, or the model itself where its class is your own"
        )
    if getattr(model_class.forward, "feeds_streams", False):
        return
    original, prepare = model_class.forward, model_class.prepare_inputs_for_generation
    prepare_cache = model_class._prepare_cache_for_generation

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        cache = kwargs.get("past_key_values")
        if cache is None and args:
            cache = next((x for x in args if _streams(x)), None)
        if cache is None or not _streams(cache) or cache.piece is not None:  # the latter: a wrapper within a wrapper
            return original(self, *args, **kwargs)
        return feed(cache, original, self, args, kwargs, torch.compiler.is_compiling())

    @functools.wraps(prepare)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        cache = kwargs.get("past_key_values")
        if cache is not None and _streams(cache):
            _check_new_tokens(cache, kwargs.get("next_sequence_length"))
        inputs = prepare(self, *args, **kwargs)
        if _streams(cache) and inputs.get("past_key_values") is not cache:  # Phi-3 with longrope, past a length
            raise UserError(
                f"generate of {type(self).__name__} drops the cache at this length of the text; "
                "go on with model(...) or sinkmodel.streaming"
            )
        return inputs

    @functools.wraps(prepare_cache)
    def _prepare_cache_for_generation(self, *args, **kwargs):
        given = inspect.signature(prepare_cache).bind(self, *args, **kwargs).arguments
        cache = given["model_kwargs"].get("past_key_values")
        if _streams(cache):
            _check_generation_mode(cache, given["generation_mode"].value, given["max_cache_length"])
        return prepare_cache(self, *args, **kwargs)

    forward.feeds_streams = True  # type: ignore[attr-defined]
    model_class.forward = forward
    model_class.prepare_inputs_for_generation = prepare_inputs_for_generation
    model_class._prepare_cache_for_generation = _prepare_cache_for_generation


def _streams(cache: Any) -> bool:
    return getattr(cache, "is_streaming", False)


# A compiled model compiles `forward` and nothing else of this. Private to torch (seen in 2.13): the public `disable`
# has dynamo try this frame anew at every step, which costs a millisecond.
@torch._dynamo.decorators.skip
def feed(
    cache: StreamingCache, forward: Callable[..., Any], model: Any, args: tuple, kwargs: dict[str, Any], compiling: bool
) -> Any:
    """What `model(...)` gives with this cache: the same as token by token."""
    fed = _admit(cache, forward, model, args, kwargs)
    with_mask = compiling or model.config._attn_implementation not in BOOLEAN
    outputs = []
    try:
        while (inputs := _begin(cache, model, fed, with_mask)) is not None:
            with torch.no_grad():  # keys are kept without gradients, so what came through them would be wrong
                outputs.append(forward(model, **inputs))
            _end(cache, fed)
    finally:
        cache.piece = None  # of a forward that was broken off: it is as if never fed, unless the cache is torn
    return _joined(outputs, fed)


@dataclass
class Fed:
    """What one forward was given."""

    name: str  # input_ids or inputs_embeds
    tokens: Tensor  # [B, T] ids or [B, T, hidden]
    valid_BT: Tensor | None  # False for pads; None: there are none
    keep: int | Tensor  # logits_to_keep
    as_tuple: bool  # return_dict=False
    others: dict[str, Any]
    done: int = 0  # columns that have been through the model
    end: int = 0  # where the piece that is under way ends


@torch.compiler.disable
def _admit(cache: StreamingCache, forward: Callable[..., Any], model: Any, args: tuple, kwargs: dict[str, Any]) -> Fed:
    """The input of a forward, after everything that could be wrong with it; the cache has its slots."""
    inputs = _bound(forward, model, args, kwargs)
    name = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
    tokens = inputs.pop(name, None)
    mask = inputs.pop("attention_mask", None)
    _check(cache, model, tokens, inputs)
    valid_BT = _valid(cache, mask, tokens)
    traits = cache.traits or traits_of(model, functools.partial(forward, model), cache.slots)
    if name == "input_ids":
        _check_ids(traits.vocabulary, tokens)
    if cache.traits is None or len(tokens) != len(cache.seen):
        cache.adopt(traits, len(tokens), sample_of(model))
        cache.model = weakref.ref(model)
    keep = inputs.pop("logits_to_keep", None)
    wanted = inputs.pop("return_dict", None)
    as_tuple = not (getattr(model.config, "return_dict", True) if wanted is None else wanted)
    return Fed(name, tokens, valid_BT, 0 if keep is None else keep, as_tuple, {**inputs, "return_dict": True})


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


@torch.compiler.disable
def _begin(cache: StreamingCache, model: Any, fed: Fed, with_mask: bool) -> dict[str, Any] | None:
    """The model's input for the next piece, and the cache ready for it; None when all is done."""
    assert cache.traits is not None
    left = fed.tokens.shape[1] - fed.done
    if left == 0:
        return None
    columns = _length(cache, left)
    reach = cache.traits.reach(cache.slots)
    late = [seen - origin + columns > reach for seen, origin in zip(cache.seen, cache.origin)]
    cache.torn = True  # until all keys agree again
    if any(late):
        cache.move_origin([seen if far else old for seen, old, far in zip(cache.seen, cache.origin, late)])
    start, fed.end = fed.done, fed.done + columns
    valid = None if fed.valid_BT is None else fed.valid_BT[:, start : fed.end]
    piece = plan(cache.ring, cache.seen, cache.origin, columns, valid, with_mask, cache.traits.device)
    if piece.delta_B is not None:
        cache.turn_sinks(piece.delta_B)
    cache.piece = piece
    cache.torn = piece.delta_B is None  # a joined piece overwrites keys that a shorter one would still want
    inputs = {
        fed.name: fed.tokens[:, start : fed.end],
        "position_ids": piece.positions_BN,
        "attention_mask": _mask(piece, model),
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": fed.keep if columns == fed.tokens.shape[1] else _kept(fed.keep, left - columns),
    }
    others = {name: _cut(x, fed, start) for name, x in fed.others.items()}
    if kind_of(model.config) == "kv_bias":
        others["sink_turn"] = cache.query_turn(columns)
    return {**others, **{name: x for name, x in inputs.items() if name in cache.traits.accepts}}


@torch.compiler.disable
def _end(cache: StreamingCache, fed: Fed) -> None:
    assert cache.piece is not None
    cache.torn = True  # until all is noted
    valid = None if fed.valid_BT is None else fed.valid_BT[:, fed.done : fed.end]
    if valid is not None and not bool(valid.all()):
        last = (~valid).any(dim=0).nonzero().max().item()
        cache.padded_until = cache.columns + int(last) + 1
    new_sinks = min(cache.seen) < cache.sinks
    cache.columns += fed.end - fed.done
    cache.seen = cache.piece.seen
    cache.piece = None
    fed.done = fed.end
    if new_sinks:
        cache.remember_sinks()
    cache.torn = False


def _cut(x: Any, fed: Fed, start: int) -> Any:
    """The part of this piece of an input with something for each token, such as token_type_ids."""
    return x[:, start : fed.end] if isinstance(x, Tensor) and x.shape[:2] == fed.tokens.shape[:2] else x


def _mask(piece: Piece, model: Any) -> Tensor | None:
    """As the attention implementation takes it: True where seen (sdpa), or 0 and the lowest number (eager)."""
    if piece.mask is None or model.config._attn_implementation in BOOLEAN:
        return piece.mask
    lowest = torch.finfo(model.dtype).min
    return torch.zeros(piece.mask.shape, dtype=model.dtype, device=piece.mask.device).masked_fill_(~piece.mask, lowest)


def _kept(keep: int | Tensor, behind: int) -> int:
    """Logits to keep of a piece with `behind` tokens after it: those that are wanted, at least one; or all of them."""
    return max(1, keep - behind) if isinstance(keep, int) and keep else 0


@torch.compiler.disable
def _joined(outputs: list[Any], fed: Fed) -> Any:
    """One output of many: logits and hidden states in a row."""
    whole = outputs[-1]
    if len(outputs) > 1:
        logits = torch.cat([output.logits for output in outputs], dim=1)
        whole.logits = logits[:, -fed.keep :] if isinstance(fed.keep, int) else logits[:, fed.keep]  # −0 takes all
        if whole.get("hidden_states") is not None:
            whole.hidden_states = tuple(torch.cat(x, dim=1) for x in zip(*(o.hidden_states for o in outputs)))
    return whole.to_tuple() if fed.as_tuple else whole


# ----------------------------------------------------------------------------------------- what `generate` asks for


def _check_generation_mode(cache: StreamingCache, mode: str, more: int) -> None:
    """UserError, before the first token, if `generate` would take tokens back after the first eviction.

    `more` is how many tokens `generate` may feed; a used cache may hold some of them already.
    """
    if mode in TAKES_BACK and (tokens := cache.columns + more + 1) > cache.slots:
        raise UserError(
            f"{mode.replace('_', ' ')} takes tokens back, which a StreamingCache can do only until it is full: this "
            f"text may get {tokens} tokens long; leave out {TAKES_BACK[mode]}, or use a budget of at least {tokens}"
        )


def _check_new_tokens(cache: StreamingCache, new: int | None) -> None:
    """UserError if `generate` was given a prompt that has nothing new for a used cache.

    transformers takes a prompt for the whole text and feeds its last `new` tokens, those that the cache does not hold.
    With a count of 0 or less that slice would be the whole prompt, another part of it, or empty.
    """
    if new is not None and new <= 0:
        raise UserError(
            f"this StreamingCache holds {cache.columns} tokens already and the prompt has only {cache.columns + new}: "
            "generate takes a prompt as the whole text so far, with new tokens at its end; append to that text, or "
            "call reset() on the cache to start from the beginning"
        )


# ------------------------------------------------------------------------------------------- what a stream is fed


def _bound(forward: Callable[..., Any], model: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, without those that the cache settles itself."""
    inputs = dict(kwargs)
    if args:
        inputs |= dict(zip(list(inspect.signature(forward).parameters)[1:], args))
    if inputs.get("use_cache") is False:
        raise UserError("use_cache=False feeds the whole text again at every step; pass use_cache=True")
    for name in ("past_key_values", "position_ids", "cache_position", "use_cache"):
        inputs.pop(name, None)
    return inputs


def _valid(cache: StreamingCache, mask: Any, tokens: Tensor) -> Tensor | None:
    """Which of the new tokens are no pads, [B, T] on the host; None where all are.

    The columns before them are what was fed: a mask that hides more of them than were pads then is refused.
    """
    if mask is None:
        return None
    T = tokens.shape[1]
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not T <= mask.shape[1] <= cache.columns + T:
        raise UserError(
            "a StreamingCache makes the attention mask itself; give a 2-D attention_mask with a 0 for each pad, as "
            "long as the new tokens or as all tokens so far, or none"
        )
    if len(mask) != len(tokens):
        raise UserError(f"attention_mask has {len(mask)} rows, the input {len(tokens)}; give one a row of the input")
    # Counted where the mask is, and brought to the host with the new columns: each look is a wait for the device.
    hidden_B1 = (mask[:, :-T] == 0).sum(dim=1, keepdim=True)
    told = torch.cat([hidden_B1, mask[:, -T:] != 0], dim=1).cpu()
    for row, (hidden, seen) in enumerate(zip(told[:, 0].tolist(), cache.seen)):
        if hidden > (pads := cache.columns - seen):
            raise UserError(
                f"the attention_mask hides {hidden - pads} of the tokens that row {row} has taken in, and a stream "
                "takes none back; mask pads in the forward that feeds them, or use "
                "sinkmodel.streaming.Stream(batch=...), whose ended rows take nothing"
            )
    valid = told[:, 1:].bool()
    return None if bool(valid.all()) else valid


def _check(cache: StreamingCache, model: Any, tokens: Any, inputs: dict[str, Any]) -> None:
    """UserError for what does not go on the stream. Nothing has been written yet."""
    if not isinstance(tokens, Tensor) or tokens.dim() < 2 or 0 in tokens.shape:
        raise UserError("a stream is fed input_ids [rows, tokens] with at least one of each")
    for name in ("labels", "output_attentions", "output_router_logits"):
        asked = inputs[name] if inputs.get(name) is not None else getattr(model.config, name, False)
        if asked is not None and asked is not False:
            raise UserError(f"{name} cannot be had with a StreamingCache; take the logits")
    if cache.model is not None and cache.model() is not model:
        raise UserError("this StreamingCache holds the stream of another model; make one a model, or reset() it")
    if cache.model is None and signature(model.config.get_text_config()) != signature(cache.config):
        raise UserError(
            f"this StreamingCache was made for another model: {_differences(cache, model)}; use model.config"
        )
    if model.config._attn_implementation not in ATTENTION:
        raise UserError(
            f"attn_implementation {model.config._attn_implementation!r} takes no mask of ours; "
            f"use model.set_attn_implementation({ATTENTION[0]!r})"
        )
    if cache.columns and len(tokens) != len(cache.seen):
        raise UserError(
            f"the stream has {len(cache.seen)} rows and was fed {len(tokens)}; it holds {cache.columns} tokens of each "
            "row, and rows cannot come or go: call reset() on the cache to start from the beginning"
        )
    if model.training:
        raise UserError("the model is in training mode, with its dropout on; call model.eval() first")
    if cache.torn:
        raise UserError("an earlier forward was broken off while it was writing; reset() the stream or restore it")


def _check_ids(vocabulary: int, tokens: Tensor) -> None:
    """Ids on an accelerator are looked at in prompts only: to look is to wait for it."""
    if tokens.dtype not in (torch.int64, torch.int32):
        raise UserError(f"input_ids are token ids, whole numbers; these are {tokens.dtype}")
    if tokens.device.type != "cpu" and tokens.shape[1] == 1:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise UserError(f"the input has the id {low if low < 0 else high}, and the model has ids 0 to {vocabulary - 1}")


def _differences(cache: StreamingCache, model: Any) -> str:
    ours, theirs = signature(cache.config), signature(model.config.get_text_config())
    return ", ".join(f"{key} {ours[key]} against {theirs[key]}" for key in ours if ours[key] != theirs[key])
