"""The state of a stream: keys, values and sinks in their slots, and the counters that belong to them.

A forward calls three methods, each with the same plan:

    state.begin(plan)                     turns sinks and window to the positions that the plan needs
    state.update(layer, keys, values)     writes the keys of the model's attention, returns what its queries see
    state.commit(plan)                    counts the tokens as fed

To turn a key by n is to rotate it (RoPE) as if its token had a position larger by n; a turn is such an n. The sinks are
kept twice: in their slots, turned, and in `sink_keys`, as the model rotated them (the originals). A plan is `placed` or
joined; `sinkmodel.cache.plan` explains both kinds.

If a forward is interrupted before `commit`, no token was counted as fed. Usually the stream can then be fed again. If
keys that are still needed were overwritten, it is torn and can only be reset. Only this file writes to a state.

Shapes: L layers, B rows, G KV heads, N tokens of the plan, C slots, S sinks, D head size, R rotary dimensions.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
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
    """The stream of a `StreamingCache`; empty while it has no rows.

    Args:
        config: the (text) config of the models whose streams it may hold.
        ring: the slots.
    """

    def __init__(self, config: Any, ring: Ring):
        self.config, self.ring = config, ring
        self.layers = [StreamingLayer() for _ in range(config.num_hidden_layers)]
        self.forget()

    def forget(self) -> None:
        """Drop the stream. The slots keep their memory for the next one."""
        self.seen: list[int] = []  # tokens of each row so far, without pads
        self.origin: list[int] = []  # for each row, the index of the token whose position is 0 for the model
        self.columns = 0  # columns fed so far, pads included
        self.padded_until = 0  # number of columns up to and including the last pad
        self.turned: list[int] = []  # for each row, the turn of the sinks in the slots from their originals
        self._torn = False
        self.model: Any = None  # weak reference to the model of this stream
        self.sample: list[float] = []  # a few of its weights, by which a restored stream recognises it
        self.traits: Traits | None = None
        self.plan: Plan | None = None  # of the running forward
        self.sink_keys: Tensor | None = None  # [L, B, G, S, D], as the model rotated them

    @property
    def torn(self) -> bool:
        """True while an interruption would leave the stream inconsistent, and after such an interruption."""
        return self._torn

    @property
    def rotary(self) -> Rotary | None:
        return self.traits.rotary if self.traits is not None else None

    # ----------------------------------------------------------------------------------------------------- the model

    def check_model(self, model: Any) -> None:
        """Raise UserError if another model is attached, or if none is and this one does not fit the config."""
        if self.model is not None:
            if self.model() is not model:
                raise UserError(
                    "this StreamingCache holds the stream of another model; make one for each model, or reset() it"
                )
            return
        ours, theirs = signature(self.config), signature(model.config.get_text_config())
        if ours != theirs:
            differences = [f"{key} {ours[key]} against {theirs[key]}" for key in ours if ours[key] != theirs[key]]
            raise UserError(
                f"this StreamingCache was made for another model: {', '.join(differences)}; use model.config"
            )

    def adopt(self, model: Any, traits: Traits, rows: int) -> None:
        """Attach a model: allocate slots for `rows` rows, or check that a restored stream fits the model."""
        sample = sample_of(model)
        if self.columns:
            self._move_to(traits, sample)
        else:
            shape = rows, traits.groups, self.ring.slots
            for layer in self.layers:
                layer.allocate((*shape, traits.key_size), (*shape, traits.value_size), traits.dtype, traits.device)
            like = self.layers[0].keys[None, :, :, : self.ring.sinks]
            with torch.inference_mode(False):  # inference tensors cannot be written outside of inference_mode
                self.sink_keys = torch.zeros_like(like).repeat(len(self.layers), 1, 1, 1, 1)
            self.seen, self.origin, self.turned = [0] * rows, [0] * rows, [0] * rows
        limit = traits.rotary.limit if traits.rotary is not None else None
        if limit != self.ring.limit:
            self.ring = replace(self.ring, limit=limit)
        self.traits, self.sample, self.model = traits, sample, weakref.ref(model)

    def _move_to(self, traits: Traits, sample: list[float]) -> None:
        """Move a restored stream to the device of its model. Raises UserError if the model does not fit."""
        keys, values = self.layers[0].keys, self.layers[0].values
        saved = (keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
        ours = (traits.groups, traits.key_size, traits.value_size, traits.dtype)
        if saved != ours:
            raise UserError(
                f"the stream was saved with (heads, key size, value size, dtype) {saved}, the model has "
                f"{ours}; load the model in the same dtype"
            )
        if self.sample != sample:
            raise UserError("the stream began with other weights; continue with the model that it was saved from")
        for layer in self.layers:
            layer.hold(layer.keys.to(traits.device), layer.values.to(traits.device))
        assert self.sink_keys is not None
        self.sink_keys = self.sink_keys.to(traits.device)

    # ------------------------------------------------------------------------------------------- the steps of a forward

    def begin(self, plan: Plan) -> None:
        """Turn the keys in the slots to the positions that the plan needs."""
        self._torn = True  # until all keys are consistent again
        if plan.origin != self.origin:
            self._move_origin(plan.origin)
        if plan.delta_B is not None:
            self._turn_sinks(plan.delta_B)
        self.plan = plan
        self._torn = not plan.placed  # `update` of a joined plan overwrites keys; a repeated forward may need them

    def update(self, layer_idx: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys [B, G, N, D] and values of a layer. Returns those that the plan's queries see."""
        plan = self.plan
        if plan is None:
            raise UserError(
                "the StreamingCache did not see this forward: call the causal language model that its config "
                "belongs to, and make the cache before the model's forward is compiled or wrapped; if its hook was "
                "uninstalled, call sinkmodel.cache.hook.install_hook(model)"
            )
        layer = self.layers[layer_idx]
        if key_states.dtype != layer.keys.dtype:
            raise UserError(
                f"the stream holds keys in {layer.keys.dtype} but got {key_states.dtype}; keep the model's dtype "
                "and autocast as they were, or reset() the stream"
            )
        if plan.placed:
            layer.write(plan, key_states, value_states)
            return layer.read(plan)
        sinks = self.ring.sinks
        turned_sinks = self._turned_sinks(layer_idx, plan)
        keys = torch.cat([turned_sinks, layer.keys[:, :, sinks:], key_states], dim=2)
        turns = turned_sinks.shape[2] // sinks if sinks else 0
        sink_values = layer.values[:, :, :sinks].repeat(1, 1, turns, 1)
        values = torch.cat([sink_values, layer.values[:, :, sinks:], value_states], dim=2)
        layer.write(plan, key_states, value_states)
        return keys, values

    def commit(self, plan: Plan) -> None:
        """Count the tokens of the plan as fed."""
        self._torn = True  # until all counters are updated
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
        """Drop the plan of an interrupted forward. If the stream is not torn, it can be fed again."""
        self.plan = None

    # -------------------------------------------------------------------------------------------------- turning keys

    def _remember_sinks(self) -> None:
        """Copy the sinks to the originals in rows whose sinks have not been turned yet; the other rows have theirs."""
        assert self.sink_keys is not None
        for row, (turned, seen) in enumerate(zip(self.turned, self.seen)):
            if turned == 0 and self.origin[row] == 0:
                new = min(seen, self.ring.sinks)
                for layer, original in zip(self.layers, self.sink_keys):
                    original[row, :, :new] = layer.keys[row, :, :new]

    def _turn_sinks(self, delta_B: list[int]) -> None:
        """Set the sinks in the slots to their originals turned by `delta_B`. All layers are computed together."""
        rotary, sinks = self.rotary, self.ring.sinks
        if delta_B == self.turned or rotary is None or not sinks:
            return
        assert self.sink_keys is not None
        delta = torch.tensor(delta_B[:1] if len(set(delta_B)) == 1 else delta_B)[:, None, None]
        turned_sinks = rotary.turned_pairs(self.sink_keys, rotary.rotation(delta, self.sink_keys.device))
        for index, layer in enumerate(self.layers):
            if rotary.layers[index]:
                for place, value in zip(rotary.pairs(layer.keys[:, :, :sinks]), turned_sinks):
                    place.copy_(value[index])
        self.turned = delta_B

    def _move_origin(self, origin: list[int]) -> None:
        """Change the tokens whose position is 0. The position of each key changes by old − new, so turn it by that."""
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
        """The sink keys of a layer, [B, G, turns × S, D]: a copy of all sinks for each column of `plan.delta_BN`."""
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
        """The rotation that turns the queries by minus the turn of the sinks, [B, 1, N or 1, R/2].

        A sink in the softmax that has a key (`kv_bias`) is not a token, and this cache does not hold it. So the queries
        are turned instead of that key.
        """
        assert self.rotary is not None
        assert self.traits is not None
        delta_BN = plan.delta_BN if plan.delta_BN is not None else torch.tensor(plan.delta_B)[:, None]
        return self.rotary.rotation(-delta_BN[:, None], self.traits.device)

    # --------------------------------------------------------------------------------------- changes between forwards

    def crop(self, count: int) -> None:
        """Remove the latest `count` columns.

        Raises UserError, and changes nothing, if tokens were evicted, or if a pad would be reached. The public `crop`
        takes −count, and so its message shows that sign.
        """
        if not 0 <= count <= self.columns:
            raise UserError(f"crop takes minus the number of tokens to remove, at least {-self.columns}; got {-count}")
        if count == 0:
            return
        if max(self.seen) > self.ring.slots:
            raise UserError(
                f"the latest {count} tokens cannot be removed: {max(self.seen) - self.ring.slots} older ones were "
                f"evicted; keep an earlier state_dict(), or use a budget above {max(self.seen)}"
            )
        if self.columns - count < self.padded_until:
            raise UserError("crop cannot reach back before a pad; reset() and feed again")
        self.columns -= count
        self.seen = [seen - count for seen in self.seen]

    def select(self, rows: list[int]) -> None:
        """Row r becomes a copy of row rows[r]."""
        for layer in self.layers:
            layer.hold(layer.keys[rows], layer.values[rows])
        assert self.sink_keys is not None
        self.sink_keys = self.sink_keys[:, rows]
        self.seen, self.origin, self.turned = (
            [of_row[row] for row in rows] for of_row in (self.seen, self.origin, self.turned)
        )

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that are held between forwards."""
        for layer in self.layers:
            if layer.is_initialized:
                yield from (layer.keys, layer.values)
        if self.sink_keys is not None:
            yield self.sink_keys

    # ----------------------------------------------------------------------------------------------- save and restore

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
        """Restore a stream that `to_dict` returned and `check_state` accepted."""
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
