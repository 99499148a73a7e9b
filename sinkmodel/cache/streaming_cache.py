"""`StreamingCache`: an endless stream through an unmodified transformers model, at constant cost.

    cache = StreamingCache(model.config, budget=1024, sinks=1)
    model(input_ids=ids, past_key_values=cache)                    # any number of tokens, again and again
    model.generate(ids, past_key_values=cache, max_new_tokens=64)

It keeps S sinks and the W = C − S latest keys in C slots a layer and KV head, allocated once (StreamingLLM, section
3.2; design, decisions 6 to 8). Window keys stay where they are, as the model rotated them; only the S sink keys are
turned, always from their originals, so that they stand right before the window. That is O(S) work a step and no drift.
Now and then positions are counted anew, and window keys are turned once for that: a key is turned at most once in its
life, and positions stay small however long the stream.

`sinkmodel.cache.pieces` has the arithmetic, `sinkmodel.cache.feeding` what happens in a forward.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from sinkmodel.cache.families import Traits, check_config, signature
from sinkmodel.cache.feeding import feed
from sinkmodel.cache.hook import install_hook
from sinkmodel.cache.pieces import Piece, Ring
from sinkmodel.cache.saved import FORMAT, NUMBERS, ROWS, TENSORS, check_state, read_state, settings_of
from sinkmodel.cache.slots import StreamingLayer
from sinkmodel.errors import UserError
from sinkmodel.rope import Rotary, Rotation
from sinkmodel.sinks import IN_SOFTMAX, kind_of, sinks_to_keep

POSITIONS = ("cache", "text")
CONVENTIONS = ("inclusive", "paper")
TAKES_BACK = {  # generation modes that crop the cache, and the arguments that ask for them
    "assisted_generation": "assistant_model, prompt_lookup_num_tokens, assistant_early_exit and use_mtp",
    "contrastive_search": "penalty_alpha",
}


class StreamingCache(Cache):
    """Sinks and a ring of recent keys, for `past_key_values` of any transformers model with RoPE, and of MPT.

    Args:
        config: the model's config (`model.config`), or the model itself where its class is not one of transformers'.
        budget: C, the slots of a KV head; the sinks and the current token count.
        sinks: S, how many of the first tokens of each row are kept for good; None: the model's own sinks, or 1, or 0
            for a model with a sink in its softmax, which takes no slot. 0 for any other model is the plain window.
        positions: "cache": sinks stand right before the window (StreamingLLM). "text": every key at its true distance.
        convention: "inclusive": a query sees C keys, its own counted. "paper": C + 1, as in the paper's code, which
            evicts after the forward (design, decision 8).

    Rows are streams of their own: with a 2-D `attention_mask` of left-padded (or otherwise padded) rows, pads take no
    slot, and each row has its own sinks. That is so for pads that are masked when they are fed: a later mask that hides
    more is refused. A forward longer than the window is fed in pieces, with the same result as token by token.
    `position_ids` are not looked at: the cache numbers the tokens. Logits come without gradients. After an interrupt
    `seen` tells how far a long forward came; after beam search the rows are the beams.

    Raises:
        UserError: here for settings that make no sense and for models that cannot be streamed, by name; in a forward,
            before anything is written, for inputs that do not go on the stream.
    """

    def __init__(
        self,
        config: Any,
        budget: int = 1024,
        sinks: int | None = None,
        positions: str = "cache",
        convention: str = "inclusive",
    ):
        model_or_config, config = config, getattr(config, "config", config)
        sinks = sinks_to_keep(config) if sinks is None else sinks
        try:
            budget, sinks = operator.index(budget), operator.index(sinks)
        except TypeError:
            raise UserError(f"budget and sinks are whole numbers, not {budget!r} and {sinks!r}") from None
        for name, value, choices in (("positions", positions, POSITIONS), ("convention", convention, CONVENTIONS)):
            if value not in choices:
                raise UserError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
        if sinks < 0 or budget <= sinks:
            raise UserError(
                f"a budget of {budget} does not hold {sinks} sinks and the current token; make it at least "
                f"{max(0, sinks) + 1} and the sinks 0 or more"
            )
        self.config = config.get_text_config()
        self.budget, self.sinks, self.positions, self.convention = budget, sinks, positions, convention
        self.slots = budget + (convention == "paper")
        check_config(self.config, self.slots, positions == "text")
        if sinks == 0 and kind_of(config) not in IN_SOFTMAX:
            warnings.warn("sinks=0 is the plain window: most models lose their way at the first eviction", stacklevel=2)
        self.ring = Ring(self.slots, sinks, text=positions == "text", ordered=self.config.model_type == "mpt")
        super().__init__(layers=[StreamingLayer() for _ in range(self.config.num_hidden_layers)])
        self._forget()
        install_hook(model_or_config)

    @property
    def window(self) -> int:
        """W = C − S."""
        return self.budget - self.sinks

    def _forget(self) -> None:
        self.seen: list[int] = []  # tokens of each row so far, pads not counted
        self.origin: list[int] = []  # the token of each row from which the model's positions count
        self.columns = 0  # tokens of each row so far, pads counted
        self.padded_until = 0  # the column behind the last pad
        self.turned: list[int] = []  # by how much the sinks in the slots are turned, row by row
        self.torn = False  # a forward was broken off after it had overwritten keys that were still wanted
        self.model: Any = None  # a weak reference to the model whose stream this is
        self.sample: list[float] = []  # a few of its weights, by which a restored stream knows it
        self.traits: Traits | None = None
        self.piece: Piece | None = None  # what the forward that is under way does
        self.sink_keys: Tensor | None = None  # [L, B, G, S, D], as the model rotated them

    # ---------------------------------------------------------------------------------------- what the hook asks for

    @property
    def in_forward(self) -> bool:
        return self.piece is not None

    def run_forward(self, forward: Callable[..., Any], model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What `model(...)` gives with this cache; `sinkmodel.cache.hook` calls it."""
        return feed(self, forward, model, args, kwargs, torch.compiler.is_compiling())

    def check_new_tokens(self, new: int | None) -> None:
        """UserError if `generate` was given a prompt that has nothing new for a used cache.

        transformers takes a prompt for the whole text and feeds its last `new` tokens, those that the cache does not
        hold. With a count of 0 or less that slice would be the whole prompt, another part of it, or empty.
        """
        if new is not None and new <= 0:
            raise UserError(
                f"this StreamingCache holds {self.columns} tokens already and the prompt has only "
                f"{self.columns + new}: generate takes a prompt as the whole text so far, with new tokens at its end; "
                "append to that text, or call reset() on the cache to start from the beginning"
            )

    def check_generation(self, mode: str, prompt: int | None, most: int) -> None:
        """UserError, before the first token, if `generate` would take tokens back after the first eviction.

        `most` is how many tokens `generate` may feed; a used cache may hold some of them already.
        """
        if mode in TAKES_BACK and (tokens := self.columns + most + 1) > self.slots:
            raise UserError(
                f"{mode.replace('_', ' ')} takes tokens back, which a StreamingCache can do only until it is full: "
                f"this text may get {tokens} tokens long; leave out {TAKES_BACK[mode]}, or use a budget of at least "
                f"{tokens}"
            )

    # ------------------------------------------------------------------------------------- what transformers calls

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Write the keys [B, G, N, D] and values of a piece, and return what its queries see."""
        piece = self.piece
        if piece is None:
            raise UserError(
                "the StreamingCache was not told of this forward: call the causal language model that its config "
                "belongs to, and make the cache before the model's forward is compiled or wrapped; if its hook was "
                "uninstalled, call sinkmodel.cache.hook.install_hook(model)"
            )
        layer = self.layers[layer_idx]
        if key_states.dtype != layer.keys.dtype:
            raise UserError(
                f"the stream holds keys in {layer.keys.dtype} and was given {key_states.dtype}; keep the model's dtype "
                "and autocast as they were, or reset() the stream"
            )
        if piece.delta_B is not None:
            layer.write(piece, key_states, value_states)
            return layer.read(piece)
        turned = self._turned_sinks(layer_idx, piece)
        keys = torch.cat([turned, layer.keys[:, :, self.sinks :], key_states], dim=2)
        turns = turned.shape[2] // self.sinks if self.sinks else 0
        sink_values = layer.values[:, :, : self.sinks].repeat(1, 1, turns, 1)
        values = torch.cat([sink_values, layer.values[:, :, self.sinks :], value_states], dim=2)
        layer.write(piece, key_states, value_states)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each row so far, pads counted: by this `generate` slices its prompt."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """−1: a stream has no end."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 4

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys that come back from `update`, and the offset at which a causal mask lets all of them be seen."""
        held = self.piece.held if self.piece is not None else self.columns + query_length
        return held, self.columns + query_length - held

    @property
    def is_compileable(self) -> bool:
        """False for `generate`, which would make masks of its own; `torch.compile` of the model works all the same."""
        return False

    @property
    def is_initialized(self) -> bool:
        return self.traits is not None

    @property
    def is_croppable(self) -> bool:
        return max(self.seen, default=0) <= self.slots

    @property
    def batch_size(self) -> int:
        return len(self.seen) or -1

    def reset(self) -> None:
        """Begin a new stream, of any number of rows, in the same memory if it fits."""
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest −`tokens_to_remove` tokens of each row, as if they had never been fed.

        Raises UserError where that is not possible: once something was evicted it does not come back.
        """
        count = -tokens_to_remove
        if count < 0 or count > self.columns:
            raise UserError(f"crop takes minus the tokens to remove, down to {-self.columns}; got {tokens_to_remove}")
        if count == 0:
            return
        if not self.is_croppable:
            raise UserError(
                f"the latest {count} tokens cannot be taken back: {max(self.seen) - self.slots} older ones were "
                f"evicted for them; keep a state_dict() from before, or a budget above {max(self.seen)}"
            )
        if self.columns - count < self.padded_until:
            raise UserError("crop cannot reach back behind a pad; reset() and feed again")
        self.columns -= count
        self.seen = [seen - count for seen in self.seen]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r becomes what row beam_idx[r] was: beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.seen:
            return
        rows = torch.arange(len(self.seen))[indices.cpu()].tolist()
        for layer in self.layers:
            layer.hold(layer.keys[rows], layer.values[rows])
        assert self.sink_keys is not None
        self.sink_keys = self.sink_keys[:, rows]
        for name in ("seen", "origin", "turned"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])

    # ----------------------------------------------------------------------------------------------- keys in motion

    def adopt(self, traits: Traits, rows: int, sample: list[float]) -> None:
        """Take a model: slots for new streams, or those of a restored one, which must be of its kind."""
        if self.columns:
            keys, values = self.layers[0].keys, self.layers[0].values
            saved = (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
            ours = (traits.groups, traits.key_size, traits.value_size, traits.dtype)
            if saved != ours:
                raise UserError(
                    f"the stream was saved with (heads, key size, value size, dtype) {saved}, the model has "
                    f"{ours}; load the model in the same dtype"
                )
            if self.sample != sample:
                raise UserError("the stream was begun with other weights; go on with the model that it was saved from")
            for layer in self.layers:
                layer.hold(layer.keys.to(traits.device), layer.values.to(traits.device))
            assert self.sink_keys is not None
            self.sink_keys = self.sink_keys.to(traits.device)
        else:
            shape = rows, traits.groups, self.slots
            for layer in self.layers:
                layer.allocate((*shape, traits.key_size), (*shape, traits.value_size), traits)
            like = self.layers[0].keys[None, :, :, : self.sinks]
            with torch.inference_mode(False):  # such tensors could not be written to outside of inference_mode
                self.sink_keys = torch.zeros_like(like).repeat(len(self.layers), 1, 1, 1, 1)
            self.seen, self.origin, self.turned = [0] * rows, [0] * rows, [0] * rows
        self.traits, self.sample = traits, sample

    @property
    def rotary(self) -> Rotary | None:
        return self.traits.rotary if self.traits is not None else None

    def remember_sinks(self) -> None:
        """Keep the originals of sinks that have just come, before any of them is turned."""
        assert self.sink_keys is not None
        for row, (turned, seen) in enumerate(zip(self.turned, self.seen)):
            if turned == 0 and self.origin[row] == 0:
                for layer, original in zip(self.layers, self.sink_keys):
                    original[row, :, : min(seen, self.sinks)] = layer.keys[row, :, : min(seen, self.sinks)]

    def turn_sinks(self, delta_B: list[int]) -> None:
        """Turn the sinks in the slots by `delta_B` from their originals: one small product for all layers."""
        if delta_B == self.turned or self.rotary is None or not self.sinks:
            return
        assert self.sink_keys is not None
        assert self.traits is not None
        delta = torch.tensor(delta_B[:1] if len(set(delta_B)) == 1 else delta_B)[:, None, None]
        rotation = self.rotary.rotation(delta, self.traits.device)
        turned = self.rotary.turned_pairs(self.sink_keys, rotation)
        for index, layer in enumerate(self.layers):
            if self.rotary.layers[index]:
                for place, value in zip(self.rotary.pairs(layer.keys[:, :, : self.sinks]), turned):
                    place.copy_(value[index])
        self.turned = delta_B

    def move_origin(self, origin: list[int]) -> None:
        """Count the model's positions from other tokens: the keys of the window are turned by the difference."""
        if self.rotary is not None and self.traits is not None:
            delta = torch.tensor([old - new for old, new in zip(self.origin, origin)])[:, None, None]
            rotation = self.rotary.rotation(delta, self.traits.device)
            for index, layer in enumerate(self.layers):
                if self.rotary.layers[index]:
                    window = layer.keys[:, :, self.sinks :]
                    for place, value in zip(self.rotary.pairs(window), self.rotary.turned_pairs(window, rotation)):
                        place.copy_(value)
        self.origin = origin

    def _turned_sinks(self, layer_idx: int, piece: Piece) -> Tensor:
        """The sink keys of a layer, once for every turn of a joined piece, [B, G, turns × S, D]."""
        assert self.sink_keys is not None
        assert piece.delta_BN is not None
        keys_BGSD = self.sink_keys[layer_idx]
        B, G, S, D = keys_BGSD.shape
        turns = piece.delta_BN.shape[1]
        keys = keys_BGSD[:, :, None].expand(B, G, turns, S, D)
        if S and self.rotary is not None and self.rotary.layers[layer_idx]:
            rotation = self.rotary.rotation(piece.delta_BN[:, None, :, None], keys.device)
            keys = self.rotary.apply(keys, rotation).to(keys.dtype)
        return keys.reshape(B, G, turns * S, D)

    def query_turn(self, columns: int) -> Rotation:
        """From where the model puts the queries of the piece to where they stand in the cache, [B, 1, N or 1, R/2].

        For a sink that is no token, and so has no key here that could be turned instead.
        """
        assert self.piece is not None
        assert self.rotary is not None
        assert self.traits is not None
        delta_BN = self.piece.delta_BN if self.piece.delta_BN is not None else torch.tensor(self.piece.delta_B)[:, None]
        return self.rotary.rotation(-delta_BN[:, None], self.traits.device)

    # ----------------------------------------------------------------------------------------------- saving a stream

    def settings(self) -> dict[str, Any]:
        """What must be the same for a stream to go on."""
        return {
            "model": signature(self.config),
            "budget": self.budget,
            "sinks": self.sinks,
            "positions": self.positions,
            "convention": self.convention,
        }

    def state_dict(self) -> dict[str, Any]:
        """The stream as it stands, as tensors and plain numbers: `torch.load(..., weights_only=True)` reads it."""
        state: dict[str, Any] = {"format": FORMAT, "settings": self.settings()}
        state |= {name: getattr(self, name) for name in NUMBERS} | {name: list(getattr(self, name)) for name in ROWS}
        if self.seen:
            assert self.sink_keys is not None
            state["keys"] = torch.stack([layer.keys for layer in self.layers])
            state["values"] = torch.stack([layer.values for layer in self.layers])
            state["sink_keys"] = self.sink_keys.clone()
            state["sample"] = list(self.sample)
            state["shapes"] = {name: list(state[name].shape) for name in TENSORS}
        return state

    def load_state_dict(self, state: Any) -> None:
        """Go on with a stream that `state_dict` gave; UserError, and nothing changed, where it does not fit."""
        check_state(state, self.settings(), len(self.layers), self.slots)
        self._forget()
        for name in NUMBERS:
            setattr(self, name, state[name])
        for name in ROWS:
            setattr(self, name, list(state[name]))
        if self.seen:
            self.sink_keys, self.sample = state["sink_keys"].clone(), list(state["sample"])
            for layer, keys, values in zip(self.layers, state["keys"], state["values"]):
                layer.hold(keys.clone(), values.clone())

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy.deepcopy: the stream without the model."""
        return {**self.__dict__, "model": None, "traits": None, "piece": None}

    def save(self, path: str | Path) -> None:
        """Write the stream to a file, which is there whole or not at all."""
        from sinkmodel.files import atomic_file

        with atomic_file(Path(path)) as file:
            torch.save(self.state_dict(), file)

    @classmethod
    def load(cls, path: str | Path, config: Any) -> StreamingCache:
        """The stream that `save` wrote, for the same model; UserError where the file is none, or another model's."""
        path = Path(path)
        state = read_state(path)
        cache = cls(config, **settings_of(state, path))
        cache.load_state_dict(state)
        return cache
