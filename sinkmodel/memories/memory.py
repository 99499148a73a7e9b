"""`Memory`: a cache that reads a whole prompt, then keeps in every KV head the tokens with the highest scores.

    memory = SnapKV(model.config, budget=1024)
    model.generate(ids, past_key_values=memory)               # compressed when the prompt has been read

    model(ids, past_key_values=memory)                        # the same by hand
    memory.end_prompt()
    model(more, past_key_values=memory)

A prompt may come in several forwards. It ends when `generate` has read it, at the column that `expect` announced, at
`end_prompt()`, or before the first forward of a single token. If its end is known in advance, each layer is compressed
right after its attention was computed, and the whole prompt is never held in all layers at once.

A method defines `observe`, which stores numbers from the attention of each layer, and `scores`, which computes scores
from them. This file does the rest with `sinkmodel.memories.pieces` (the arithmetic of a forward), `selection` (which
slots to keep) and `layer` (the slots).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from sinkmodel.cache.hook import install_hook, uncompiled
from sinkmodel.cache.inputs import MASKLESS, Request, joined, piece_of
from sinkmodel.checks import one_of
from sinkmodel.errors import UserError
from sinkmodel.memories.admission import admit, check_can_end, check_dtype, check_open, not_observed
from sinkmodel.memories.arguments import check_room, whole
from sinkmodel.memories.hooks import alone, attention_modules, grouped_as, observed
from sinkmodel.memories.interface import MemoryInterface
from sinkmodel.memories.layer import SPARE, MemoryLayer
from sinkmodel.memories.observation import Observation
from sinkmodel.memories.pieces import Implementation, Piece, lengths, next_piece, ranks
from sinkmodel.memories.selection import EMPTY, best, budgets_by_ratio, force
from sinkmodel.model_support import check_config
from sinkmodel.probe import Traits, sample_of
from sinkmodel.products import fast_products
from sinkmodel.rope import Rotary

Positions = Literal["text", "cache"]


class Memory(MemoryInterface):
    """Base class of the methods in this package; see the module's docstring.

    Args:
        config: the model's config, or the model itself if its class is not one of transformers'.
        budget: C, the number of prompt tokens that each KV head keeps.
        compression_ratio: instead of a budget, the share of each prompt that is evicted: at least 0, below 1.
        sinks: number of leading tokens of each row that are always kept.
        window: number of the last tokens of each row that are always kept.
        positions: "text": kept keys stay at their positions in the text. "cache": kept tokens are renumbered from 0, in
            the order of the text, so that the positions after a long prompt are small.

    Rows may be left-padded, with a 2-D `attention_mask`. A row that is not longer than the budget is kept whole. If a
    memory evicts only at the end of the prompt, it then grows by one slot with every token.

    Raises:
        UserError: at construction for invalid settings and, by name, for unsupported models; in a forward, before
            anything is written, for inputs that cannot continue what was read.
    """

    SETTINGS: tuple[str, ...] = ("budget", "compression_ratio", "sinks", "window", "positions", "interval")
    interval: int | None = None  # tokens between two evictions after the prompt; None: no evictions then
    compresses_in_attention = True  # False if a subclass compresses layers elsewhere
    takes_budget = True  # False if the method decides how much it keeps
    even = True  # True if all layers and heads have their empty slots in the same columns

    def __init__(
        self,
        config: Any,
        budget: int | None = None,
        *,
        compression_ratio: float | None = None,
        sinks: int = 0,
        window: int = 0,
        positions: Positions = "text",
    ):
        model_or_config, config = config, getattr(config, "config", config)
        self.config = config.get_text_config()
        self.sinks, self.window = whole(sinks, "sinks", 0), whole(window, "window", 0)
        self.budget = check_room(self.name, budget, compression_ratio, self.sinks, self.window)
        self.compression_ratio = compression_ratio
        self.positions = one_of("positions", positions, Positions)
        check_config(self.config, 1, True)
        super().__init__(layers=[MemoryLayer() for _ in range(self.config.num_hidden_layers)])
        self._begin()
        install_hook(model_or_config)

    def _begin(self) -> None:
        self.columns = 0  # columns read so far, pads included
        self.seen: list[int] = []  # tokens of each row so far, without pads
        self.kept: list[int] = []  # how many of them are held
        self.budgets: list[int] = []  # slots of each row after the prompt
        self.shift: list[int] = []  # for each row's next token: position in the text minus position for the model
        self.expected: int | None = None  # number of columns of the prompt, if known
        self.ended = False  # the prompt has been compressed
        self.since = 0  # tokens since the last eviction
        self.torn = False  # a forward was interrupted while it was writing
        self.in_forward = False
        self.implementation: Implementation = "sdpa"
        self.piece: Piece | None = None  # the columns that the running forward reads
        self.model: Any = None  # weak reference to the model
        self.sample: list[float] = []  # a few of its weights, by which a restored memory recognises it
        self.traits: Traits | None = None
        self.modules: dict[int, Any] = {}  # its attention modules by layer
        self.attended = 0  # layers whose attention was observed in the running forward
        self.scale = 1.0  # scale of its attention
        self.softcap: float | None = None
        for layer in self.layers:
            layer.clear()

    def reset(self) -> None:
        """Drop everything: the next forward begins another prompt."""
        self._begin()

    # ------------------------------------------------------------------------------------------- what a method defines

    @property
    def name(self) -> str:  # type: ignore[override]
        return type(self).__name__

    @property
    def observes(self) -> bool:
        """Whether `observe` needs the attention of the running forward."""
        return not self.ended or self.interval is not None

    def observe(self, layer: MemoryLayer, seen: Observation) -> None:
        """Store what `scores` needs from the attention that was just computed in a layer."""

    def scores(self, layer: MemoryLayer) -> Tensor:
        """The score of each slot in use, [B, G, K], or [B, 1, K] if all heads are equal. The highest are kept."""
        raise NotImplementedError

    def windows(self) -> list[int]:
        """For each row, the number of its last tokens that are always kept."""
        return [self.window] * len(self.seen)

    def index_of(self, layer: MemoryLayer) -> int:
        return next(index for index, each in enumerate(self.layers) if each is layer)

    def rotary_of(self, layer: MemoryLayer) -> Rotary | None:
        """How the keys of a layer are rotated; None if they are not."""
        assert self.traits is not None
        rotary = self.traits.rotary
        return rotary if rotary is not None and rotary.layers[self.index_of(layer)] else None

    def of_last_queries(self, layer: MemoryLayer, query_BHND: Tensor) -> Observation:
        """The attention of stored queries, the last ones of the prompt, to all keys that are held."""
        keys, values = layer.held()
        full_BK = layer.held_positions()[:, 0] != EMPTY
        padded = not bool(full_BK.all())
        valid_BN = full_BK[:, -query_BHND.shape[2] :] if padded else None
        module = self.modules[self.index_of(layer)]
        full = full_BK if padded else None
        return Observation(module, query_BHND, keys, values, full, None, valid_BN, self.scale, self.softcap)

    # --------------------------------------------------------------------------------------------- the end of a prompt

    def expect(self, columns: int) -> None:
        """Announce that the prompt has `columns` columns, pads included. It ends with the forward that reaches them.

        Raises UserError if a prompt has been compressed already, or if as many columns have been read already.
        """
        check_open(self)
        if columns <= self.columns:
            raise UserError(f"{self.name} has read {self.columns} columns, and the prompt should end with {columns}")
        self.expected = columns

    def end_prompt(self) -> None:
        """Compress what has been read. Raises UserError if nothing was read, or if it is compressed already."""
        check_can_end(self)
        self.budgets = self._budgets(self.seen)
        self.torn = True
        for layer in self.layers:
            self._compress(layer, self.seen)
        self._note_end()
        self.torn = False

    def _budgets(self, seen: list[int]) -> list[int]:
        if self.budget is not None:
            return [self.budget] * len(seen)
        assert self.compression_ratio is not None
        return budgets_by_ratio(seen, self.compression_ratio, self.sinks, self.window)

    def _compress(self, layer: MemoryLayer, seen: list[int]) -> None:
        """Keep the best slots of a layer. `seen` is the number of tokens of each row."""
        if any(n > budget for n, budget in zip(seen, self.budgets)):
            layer.keep(*best(self._forced(layer, self.scores(layer), seen), self.budgets))
        layer.state.clear()
        rotary = self.rotary_of(layer)
        if self.positions == "cache" and rotary is not None:
            positions = layer.held_positions()
            # A memory that evicts repeatedly holds its keys at position 0 and turns them when it reads.
            target = ranks(positions) if self.interval is None else 0
            layer.keys = rotary.turn(layer.keys, (target - positions).masked_fill(positions == EMPTY, 0))

    def _forced(self, layer: MemoryLayer, scores: Tensor, seen: list[int]) -> Tensor:
        positions = layer.held_positions()
        self.check_finite(scores)
        if scores.shape[1] > positions.shape[1]:  # each query head keeps its own set
            positions = positions.repeat_interleave(scores.shape[1] // positions.shape[1], dim=1)
        return force(scores, positions, self.sinks, self.windows(), seen)

    def check_finite(self, scores: Tensor) -> None:
        if not bool(torch.isfinite(scores).all()):
            raise self.unusable(f"the scores of {self.name} are not finite; look for NaN in the model or in the scorer")

    def _note_end(self) -> None:
        self.kept = [min(n, budget) for n, budget in zip(self.seen, self.budgets)]
        if self.positions == "cache":
            self.shift = [n - kept for n, kept in zip(self.seen, self.kept)]
        self.ended, self.expected, self.since = True, None, 0

    def columns_to_next_event(self, valid_BT: Tensor | None = None) -> int:
        """How many of the next columns can be read before something is evicted; `valid_BT` is False for pads."""
        if not self.ended:
            return self.expected - self.columns if self.expected is not None else 2**62
        return self.interval - self.since if self.interval is not None else 2**62

    def evicts_after(self, count: int, seen: list[int]) -> bool:
        """Whether slots are evicted after `count` more columns, apart from the end of a prompt.

        `seen` is the number of tokens of each row at that time.
        """
        return self.ended and self.interval is not None and self.since + count == self.interval

    def visible_in(self, layer: MemoryLayer, piece: Piece) -> tuple[Tensor | None, Tensor | None]:
        """Which slots of a layer hold a token, [B, K] or [B, G, K], and the mask of the piece; None as in `Piece`.

        The mask is boolean, or additive in the dtype of the keys.
        """
        return piece.full_BK, piece.mask

    # ------------------------------------------------------------------------------------------------------- a forward

    @uncompiled
    def run_forward(self, forward: Callable[..., Any], model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of `model(...)` with this memory; `sinkmodel.cache.hook` calls it."""
        with alone(model):
            return self._run_forward(forward, model, args, kwargs)

    def _run_forward(self, forward: Callable[..., Any], model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        request = self._admit(forward, model, args, kwargs)
        if not self.ended and self.expected is None and self.columns and request.tokens.shape[1] == 1:
            self.end_prompt()
        self.in_forward = True
        try:
            outputs = self.read(forward, model, request)
        finally:
            self.in_forward, self.piece = False, None
        return joined(outputs, request)

    def _admit(self, forward: Callable[..., Any], model: Any, args: tuple, kwargs: dict[str, Any]) -> Request:
        """The checked input of a forward."""
        request, traits = admit(self, forward, model, args, kwargs)
        if self.traits is None:
            self.traits, self.model, self.modules = traits, weakref.ref(model), attention_modules(model)
            self.sample = sample_of(model)
            for layer in self.layers:
                layer.move_to(traits.device)
        if not self.seen:
            self.seen, self.kept, self.shift = ([0] * len(request.tokens) for _ in range(3))
        name = model.config.get_text_config()._attn_implementation
        self.implementation = "eager" if name == "eager" else "flash" if name in MASKLESS else "sdpa"
        return request

    def read(self, forward: Callable[..., Any], model: Any, request: Request) -> list[Any]:
        """The outputs of the model for a request, one for each piece."""
        outputs, done = [], 0
        while done < request.tokens.shape[1]:
            self.piece = self.plan(request, done)
            if self.piece.ends_prompt:
                self.budgets = self._budgets(self.piece.seen)
            outputs.append(self.run(forward, model, request, self.piece))
            done = self.piece.end
        return outputs

    def plan(self, request: Request, done: int) -> Piece:
        return next_piece(self, request, done)

    def run(self, forward: Callable[..., Any], model: Any, request: Request, piece: Piece) -> Any:
        assert self.traits is not None
        settled = {"position_ids": piece.place_BN, "past_key_values": self, "use_cache": True}
        inputs = piece_of(request, piece.start, piece.end, settled, self.traits.accepts)
        self.torn, self.attended = True, 0
        rows = (piece.end - piece.start) * len(self.seen)
        with torch.no_grad(), self.around(model), fast_products(rows=rows):
            output = forward(model, **inputs)
        if self.attended < len(self.layers):
            self._begin()
            raise not_observed(self)
        self.commit(piece)
        self.torn = False
        return output

    @contextmanager
    def around(self, model: Any) -> Iterator[None]:
        """The context in which the model reads a piece."""
        with observed(self, model):
            yield

    def commit(self, piece: Piece) -> None:
        """Count the columns and tokens of a piece as read."""
        count = piece.end - piece.start
        new = lengths(count, piece.valid_BN, len(self.seen))
        self.columns, self.seen = self.columns + count, piece.seen
        self.kept = [n + more for n, more in zip(self.kept, new)]
        if piece.ends_prompt:
            self._note_end()
        elif self.ended and self.interval is not None:
            self.since = 0 if piece.evicts else self.since + count
            if piece.evicts:
                self.kept = [min(n, budget) for n, budget in zip(self.kept, self.budgets)]
            if self.positions == "cache":
                self.shift = [n - kept for n, kept in zip(self.seen, self.kept)]

    # ----------------------------------------------------------------------------------------------------- in a layer

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Add the keys [B, G, N, D] and values of a piece. Returns all that its queries may see."""
        piece, layer = self.piece, self.layers[layer_idx]
        if piece is None:
            raise UserError(
                f"the {self.name} did not see this forward: call the causal language model that its config belongs "
                "to, and make the memory before the model's forward is compiled or wrapped"
            )
        value_states = value_states.to(key_states.dtype)  # under autocast the values may have another dtype
        if layer.keys is not None:
            check_dtype(self, layer.keys.dtype, key_states.dtype)
            apart = layer.keys.shape[1] // key_states.shape[1]
            if apart > 1:  # each query head holds its own set
                key_states, value_states = (x.repeat_interleave(apart, dim=1) for x in (key_states, value_states))
        rotary = self._turned_when_read(layer)
        if rotary is not None:
            key_states = rotary.turn(key_states, -piece.place_BN[:, None])
        spare = SPARE if self.interval is None else self.interval
        layer.append(key_states, value_states, piece.token_BN, spare, copy=not piece.ends_prompt)
        keys, values = layer.held()
        if rotary is not None:
            keys = rotary.turn(keys, ranks(layer.held_positions()).clamp(min=0))
        return keys, values

    def _turned_when_read(self, layer: MemoryLayer) -> Rotary | None:
        if self.positions == "text" or self.interval is None or not self.ended:
            return None
        return self.rotary_of(layer)

    def attend(
        self, attention: Callable[..., Any], module: Any, query: Tensor, key: Tensor, value: Tensor, kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Run the model's own attention with the mask of the piece, observe it, then perhaps evict slots."""
        piece, layer = self.piece, self.layers[module.layer_idx]
        assert piece is not None
        full, mask = self.visible_in(layer, piece)
        if mask is not None and mask.dtype == torch.bool and self.implementation == "eager":
            lowest = torch.finfo(query.dtype).min
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, lowest)
        self.scale, self.softcap = kwargs.get("scaling") or query.shape[-1] ** -0.5, kwargs.get("softcap")
        places, valid = piece.place_BN, piece.valid_BN
        seen = Observation(module, query, key, value, full, places, valid, self.scale, self.softcap)
        output = self.attend_and_observe(attention, layer, seen, mask, kwargs)
        self.attended += 1
        if piece.ends_prompt and self.compresses_in_attention:
            self._compress(layer, piece.seen)
        if piece.evicts:
            self._evict(layer, piece)
        return output

    def attend_and_observe(
        self, attention: Callable[..., Any], layer: MemoryLayer, seen: Observation, mask: Tensor | None, kwargs: Any
    ) -> tuple[Tensor, Any]:
        """The output of `attention` for the input in `seen`. Also calls `observe`, if the method needs it."""
        query, key = seen.query_BHND, seen.keys_BGKD
        output = attention(grouped_as(seen.module, query, key), query, key, seen.values_BGKV, mask, **kwargs)
        if self.observes:
            self.observe(layer, seen)
        return output

    def _evict(self, layer: MemoryLayer, piece: Piece) -> None:
        surplus = layer.length - max(self.budgets)
        even = len(set(self.budgets)) == 1
        if surplus <= 0 and even:
            return
        scores, positions = self.scores(layer), layer.held_positions()
        splits = scores.shape[1] > positions.shape[1]  # from now on each query head keeps its own set
        if surplus == 1 and even and not splits:  # a decoding step: few operations, and the host reads no scores
            empty = min(self.kept) + piece.end - piece.start < layer.length
            forced = force(scores, positions, self.sinks, self.windows(), piece.seen, empty)
            layer.drop_one(forced.argmin(dim=-1))
        else:
            layer.keep(*best(self._forced(layer, scores, piece.seen), self.budgets))
