"""The state of a stream: keys, values and sinks in their slots, and the counters that belong to them.

A forward goes through three verbs, each with the same plan:

    state.begin(plan)                     sinks and window are turned to where the plan wants them
    state.update(layer, keys, values)     the model's attention writes its keys, and gets what its queries see
    state.commit(plan)                    the tokens count as fed

A forward that is broken off before `commit` leaves the stream as if it had not been fed, or torn: then some keys are
overwritten or turned that still count. Nothing outside of this file writes to a state.

Shapes: L layers, B rows, G KV heads, N tokens of the plan, C slots, S sinks, D head size, R rotary dimensions.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sinkmodel.cache.layer import StreamingLayer
from sinkmodel.cache.plan import Plan, Ring
from sinkmodel.cache.serialization import NUMBERS, ROWS, TENSORS
from sinkmodel.errors import UserError
from sinkmodel.model_support import signature
from sinkmodel.probe import Traits, sample_of
from sinkmodel.rope import Rotary, Rotation


class State:
    """The stream of a `StreamingCache`, or nothing while it has no rows.

    Args:
        config: the (text) config of the models whose streams it may hold.
        ring: which slots there are.
    """

    def __init__(self, config: Any, ring: Ring):
        self.config, self.ring = config, ring
        self.layers = [StreamingLayer() for _ in range(config.num_hidden_layers)]
        self.forget()

    def forget(self) -> None:
        """Hold no stream. Slots keep their memory for the next one."""
        self.seen: list[int] = []  # tokens of each row so far, pads not counted
        self.origin: list[int] = []  # the token of each row from which the model's positions count
        self.columns = 0  # tokens of each row so far, pads counted
        self.padded_until = 0  # columns up to the last pad, that one included
        self.turned: list[int] = []  # by how much the sinks in the slots are turned, row by row
        self._torn = False
        self.model: Any = None  # a weak reference to the model whose stream this is
        self.sample: list[float] = []  # a few of its weights, by which a restored stream knows it
        self.traits: Traits | None = None
        self.plan: Plan | None = None  # of the forward that is under way
        self.sink_keys: Tensor | None = None  # [L, B, G, S, D], as the model rotated them

    @property
    def torn(self) -> bool:
        """True if a forward was broken off after it had changed keys that are still wanted."""
        return self._torn

    @property
    def rotary(self) -> Rotary | None:
        return self.traits.rotary if self.traits is not None else None

    # ----------------------------------------------------------------------------------------------------- the model

    def check_model(self, model: Any) -> None:
        """UserError for another model than that of the stream, or than a stream of this state can have."""
        if self.model is not None:
            if self.model() is not model:
                raise UserError(
                    "this StreamingCache holds the stream of another model; make one a model, or reset() it"
                )
            return
        ours, theirs = signature(self.config), signature(model.config.get_text_config())
        if ours != theirs:
            differences = [f"{key} {ours[key]} against {theirs[key]}" for key in ours if ours[key] != theirs[key]]
            raise UserError(
                f"this StreamingCache was made for another model: {', '.join(differences)}; use model.config"
            )

    def adopt(self, model: Any, traits: Traits, rows: int) -> None:
        """Take a model: slots for `rows` new streams, or those of a restored one, which must be of its kind."""
        sample = sample_of(model)
        if self.columns:
            self._move_to(traits, sample)
        else:
            shape = rows, traits.groups, self.ring.slots
            for layer in self.layers:
                layer.allocate((*shape, traits.key_size), (*shape, traits.value_size), traits.dtype, traits.device)
            like = self.layers[0].keys[None, :, :, : self.ring.sinks]
            with torch.inference_mode(False):  # such tensors could not be written to outside of inference_mode
                self.sink_keys = torch.zeros_like(like).repeat(len(self.layers), 1, 1, 1, 1)
            self.seen, self.origin, self.turned = [0] * rows, [0] * rows, [0] * rows
        limit = traits.rotary.limit if traits.rotary is not None else None
        if limit != self.ring.limit:
            self.ring = replace(self.ring, limit=limit)
        self.traits, self.sample, self.model = traits, sample, weakref.ref(model)

    def _move_to(self, traits: Traits, sample: list[float]) -> None:
        """Bring a restored stream to the device of its model."""
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

    # ----------------------------------------------------------------------------------------------------- the verbs

    def begin(self, plan: Plan) -> None:
        """Put the keys in the slots to where the plan wants them."""
        self._torn = True  # until all keys agree again
        if plan.origin != self.origin:
            self._move_origin(plan.origin)
        if plan.delta_B is not None:
            self._turn_sinks(plan.delta_B)
        self.plan = plan
        self._torn = not plan.placed  # a joined plan overwrites keys that a shorter one would still want

    def update(self, layer_idx: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys [B, G, N, D] and values of a layer, and return what the queries of the plan see."""
        plan = self.plan
        if plan is None:
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
        if plan.placed:
            layer.write(plan, key_states, value_states)
            return layer.read(plan)
        sinks = self.ring.sinks
        turned = self._turned_sinks(layer_idx, plan)
        keys = torch.cat([turned, layer.keys[:, :, sinks:], key_states], dim=2)
        turns = turned.shape[2] // sinks if sinks else 0
        sink_values = layer.values[:, :, :sinks].repeat(1, 1, turns, 1)
        values = torch.cat([sink_values, layer.values[:, :, sinks:], value_states], dim=2)
        layer.write(plan, key_states, value_states)
        return keys, values

    def commit(self, plan: Plan) -> None:
        """Count the tokens of the plan as fed."""
        self._torn = True  # until all is noted
        if plan.padded:
            self.padded_until = self.columns + plan.padded
        new_sinks = min(self.seen) < self.ring.sinks
        self.columns += plan.columns
        self.seen = plan.seen
        self.plan = None
        if new_sinks:
            self._remember_sinks()
        self._torn = False

    def abandon(self) -> None:
        """End a forward that was broken off: it is as if it had never begun, unless the stream is torn."""
        self.plan = None

    # ------------------------------------------------------------------------------------------------ keys in motion

    def _remember_sinks(self) -> None:
        """Keep the originals of sinks that have just come, before any of them is turned."""
        assert self.sink_keys is not None
        for row, (turned, seen) in enumerate(zip(self.turned, self.seen)):
            if turned == 0 and self.origin[row] == 0:
                new = min(seen, self.ring.sinks)
                for layer, original in zip(self.layers, self.sink_keys):
                    original[row, :, :new] = layer.keys[row, :, :new]

    def _turn_sinks(self, delta_B: list[int]) -> None:
        """Turn the sinks in the slots by `delta_B` from their originals: one small product for all layers."""
        rotary, sinks = self.rotary, self.ring.sinks
        if delta_B == self.turned or rotary is None or not sinks:
            return
        assert self.sink_keys is not None
        delta = torch.tensor(delta_B[:1] if len(set(delta_B)) == 1 else delta_B)[:, None, None]
        turned = rotary.turned_pairs(self.sink_keys, rotary.rotation(delta, self.sink_keys.device))
        for index, layer in enumerate(self.layers):
            if rotary.layers[index]:
                for place, value in zip(rotary.pairs(layer.keys[:, :, :sinks]), turned):
                    place.copy_(value[index])
        self.turned = delta_B

    def _move_origin(self, origin: list[int]) -> None:
        """Count the model's positions from other tokens: the keys of the window are turned by the difference."""
        rotary = self.rotary
        if rotary is not None:
            delta = torch.tensor([old - new for old, new in zip(self.origin, origin)])[:, None, None]
            rotation = rotary.rotation(delta, self.layers[0].keys.device)
            for index, layer in enumerate(self.layers):
                if rotary.layers[index]:
                    window = layer.keys[:, :, self.ring.sinks :]
                    for place, value in zip(rotary.pairs(window), rotary.turned_pairs(window, rotation)):
                        place.copy_(value)
        self.origin = origin

    def _turned_sinks(self, layer_idx: int, plan: Plan) -> Tensor:
        """The sink keys of a layer, once for every turn of a joined plan, [B, G, turns × S, D]."""
        assert self.sink_keys is not None
        assert plan.delta_BN is not None
        keys_BGSD = self.sink_keys[layer_idx]
        B, G, S, D = keys_BGSD.shape
        turns = plan.delta_BN.shape[1]
        keys = keys_BGSD[:, :, None].expand(B, G, turns, S, D)
        if S and self.rotary is not None and self.rotary.layers[layer_idx]:
            rotation = self.rotary.rotation(plan.delta_BN[:, None, :, None], keys.device)
            keys = self.rotary.apply(keys, rotation).to(keys.dtype)
        return keys.reshape(B, G, turns * S, D)

    def query_turn(self, plan: Plan) -> Rotation:
        """From where the model puts the queries of the plan to where they stand in the cache, [B, 1, N or 1, R/2].

        For a sink that is not a token, and so has no key here that could be turned instead.
        """
        assert self.rotary is not None
        assert self.traits is not None
        delta_BN = plan.delta_BN if plan.delta_BN is not None else torch.tensor(plan.delta_B)[:, None]
        return self.rotary.rotation(-delta_BN[:, None], self.traits.device)

    # --------------------------------------------------------------------------------------- changes between forwards

    def crop(self, count: int) -> None:
        """Forget the latest `count` columns of each row; UserError, and nothing changed, if something was evicted."""
        if not 0 <= count <= self.columns:
            raise UserError(f"crop takes minus the tokens to remove, down to {-self.columns}; got {-count}")
        if count == 0:
            return
        if max(self.seen) > self.ring.slots:
            raise UserError(
                f"the latest {count} tokens cannot be taken back: {max(self.seen) - self.ring.slots} older ones were "
                f"evicted for them; keep a state_dict() from before, or a budget above {max(self.seen)}"
            )
        if self.columns - count < self.padded_until:
            raise UserError("crop cannot reach back before a pad; reset() and feed again")
        self.columns -= count
        self.seen = [seen - count for seen in self.seen]

    def select(self, rows: list[int]) -> None:
        """Row r becomes what row rows[r] was."""
        for layer in self.layers:
            layer.hold(layer.keys[rows], layer.values[rows])
        assert self.sink_keys is not None
        self.sink_keys = self.sink_keys[:, rows]
        self.seen, self.origin, self.turned = (
            [of_row[row] for row in rows] for of_row in (self.seen, self.origin, self.turned)
        )

    # ------------------------------------------------------------------------------------------------ saved, restored

    def to_dict(self) -> dict[str, Any]:
        """The stream as plain numbers and tensors, without the settings of its cache."""
        state: dict[str, Any] = {name: getattr(self, name) for name in NUMBERS}
        state |= {name: list(getattr(self, name)) for name in ROWS}
        if self.seen:
            assert self.sink_keys is not None
            state["keys"] = torch.stack([layer.keys for layer in self.layers])
            state["values"] = torch.stack([layer.values for layer in self.layers])
            state["sink_keys"] = self.sink_keys.clone()
            state["sample"] = list(self.sample)
            state["shapes"] = {name: list(state[name].shape) for name in TENSORS}
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Hold the stream that `to_dict` gave; it has been checked."""
        self.forget()
        self.columns, self.padded_until, self._torn = (state[name] for name in NUMBERS)
        self.seen, self.origin, self.turned = (list(state[name]) for name in ROWS)
        if self.seen:
            self.sink_keys, self.sample = state["sink_keys"].clone(), list(state["sample"])
            for layer, keys, values in zip(self.layers, state["keys"], state["values"]):
                layer.hold(keys.clone(), values.clone())

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy.deepcopy: the stream without the model."""
        return {**self.__dict__, "model": None, "traits": None, "plan": None}
