"""The slots of one layer of a memory: keys, values, positions, and the method's numbers for each slot.

Every KV head has its own set of tokens: slot 5 of one head may hold another token than slot 5 of the next. All heads of
a layer have the same number of slots. A slot without a token has position `EMPTY`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sinkmodel.memories.selection import EMPTY

SPARE = 64  # slots that are added at once for single tokens, if the number needed is unknown


class MemoryLayer(CacheLayerMixin):
    """Slots [0, length) of `keys` [B, G, capacity, D], `values` [B, G, capacity, V] and `positions` [B, G, capacity].

    `per_slot` holds a method's numbers for each slot; the slots are their last dimension. `state` holds its numbers for
    the prompt as a whole; their first dimension is the row.
    """

    is_sliding = False
    keys: Any  # Tensor; None before the first token; so are `values` and `positions`
    values: Any
    positions: Any

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.keys = self.values = self.positions = None
        self.length = 0
        self.per_slot: dict[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}
        self.is_initialized = False

    # -------------------------------------------------------------------------------------------------------- reading

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys [B, G, K, D] and values [B, G, K, V] of the K slots in use, as views."""
        if self.length == self.keys.shape[2]:
            return self.keys, self.values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def held_positions(self) -> Tensor:
        """The text position of the token in each slot, [B, G, K]; `EMPTY` if there is none."""
        return self.positions[:, :, : self.length]

    def numbers(self, name: str, *shape: int) -> Tensor:
        """A method's numbers for the slots in use, [*shape, K] in fp32, as a writable view. New slots have 0."""
        if name not in self.per_slot:
            self.per_slot[name] = torch.zeros(*shape, self.keys.shape[2], device=self.keys.device)
        return self.held_numbers(name)

    def held_numbers(self, name: str) -> Tensor:
        return self.per_slot[name][..., : self.length]

    def tensors(self) -> list[Tensor]:
        """All tensors of the layer."""
        slots = [x for x in (self.keys, self.values, self.positions) if x is not None]
        return [*slots, *self.per_slot.values(), *self.state.values()]

    # -------------------------------------------------------------------------------------------------------- changing

    def append(
        self, keys_BGND: Tensor, values_BGNV: Tensor, positions_BN: Tensor, spare: int = SPARE, copy: bool = True
    ) -> None:
        """Add N tokens.

        Args:
            spare: number of slots to add if there is none left for a single token.
            copy: False to hold the first tokens without a copy, for a prompt that is compressed at once.
        """
        N = keys_BGND.shape[2]
        groups = keys_BGND.shape[1]
        if self.keys is None:
            clone = torch.Tensor.clone if copy else (lambda x, **_: x)
            self.keys = clone(keys_BGND, memory_format=torch.contiguous_format)
            self.values = clone(values_BGNV, memory_format=torch.contiguous_format)
            self.positions = positions_BN[:, None].expand(-1, groups, -1)
            self.length, self.is_initialized = N, True
            return
        end = self.length + N
        if end > self.keys.shape[2]:
            self._grow(max(end, self.length + spare) if spare >= N else end)
        self.keys[:, :, self.length : end] = keys_BGND
        self.values[:, :, self.length : end] = values_BGNV
        self.positions[:, :, self.length : end] = positions_BN[:, None]
        self.length = end

    def _grow(self, capacity: int) -> None:
        def larger(x: Tensor, dim: int) -> Tensor:
            shape = list(x.shape)
            shape[dim] = capacity
            grown = torch.zeros(shape, dtype=x.dtype, device=x.device)
            grown.narrow(dim, 0, self.length).copy_(x.narrow(dim, 0, self.length))
            return grown

        self.keys, self.values = larger(self.keys, 2), larger(self.values, 2)
        self.positions = larger(self.positions, 2)
        self.per_slot = {name: larger(x, -1) for name, x in self.per_slot.items()}

    def keep(self, slots_BGC: Tensor, full_BGC: Tensor) -> None:
        """Keep only these slots, in this order, in tensors of exactly their size. Slots that are not `full` are empty.

        If there are H sets instead of G, every query head gets its own keys and values (group rule "as_published").
        """
        apart = slots_BGC.shape[1] // self.keys.shape[1]
        keys, values = self.held()
        positions = self.held_positions()
        if apart > 1:
            keys, values, positions = (x.repeat_interleave(apart, dim=1) for x in (keys, values, positions))
        index = slots_BGC[..., None]
        self.keys = keys.gather(2, index.expand(-1, -1, -1, keys.shape[-1]))
        self.values = values.gather(2, index.expand(-1, -1, -1, values.shape[-1]))
        self.positions = positions.gather(2, slots_BGC).masked_fill(~full_BGC, EMPTY)
        self.per_slot = {name: _picked(x[..., : self.length], slots_BGC) for name, x in self.per_slot.items()}
        self.length = slots_BGC.shape[2]

    def drop_one(self, slot_BG: Tensor) -> None:
        """Remove one slot of each head. The last slot moves into its place; nothing else is copied."""
        last = self.length - 1
        slot_BG1 = slot_BG[..., None]
        for x in (self.keys, self.values):
            index = slot_BG1[..., None].expand(-1, -1, 1, x.shape[-1])
            x.scatter_(2, index, x[:, :, last : last + 1].clone())
        self.positions.scatter_(2, slot_BG1, self.positions[:, :, last : last + 1].clone())
        for x in self.per_slot.values():
            index = slot_BG1 if x.dim() == 3 else slot_BG1[:, :, None].expand(-1, -1, x.shape[2], 1)
            x.scatter_(-1, index, x[..., last : last + 1].clone())
            x[..., last] = 0
        self.length = last

    def crop(self, count: int) -> None:
        """Remove the `count` latest slots."""
        self.length -= count

    def select_rows(self, rows: list[int]) -> None:
        """Row r becomes a copy of row rows[r]; rows do not share memory."""
        if self.keys is None:
            return
        self.keys, self.values, self.positions = self.keys[rows], self.values[rows], self.positions[rows]
        self.per_slot = {name: x[rows] for name, x in self.per_slot.items()}
        self.state = {name: x[rows] for name, x in self.state.items()}

    def move_to(self, device: torch.device) -> None:
        """Move everything to `device`, for a memory that was restored on another one."""
        if self.keys is not None and self.keys.device != device:
            self.keys, self.values, self.positions = (x.to(device) for x in (self.keys, self.values, self.positions))
            self.per_slot = {name: x.to(device) for name, x in self.per_slot.items()}
            self.state = {name: x.to(device) for name, x in self.state.items()}

    def copied(self) -> MemoryLayer:
        """A copy of the layer that shares no memory with it."""
        layer = MemoryLayer()
        layer.keys, layer.values = (None if x is None else x.clone() for x in (self.keys, self.values))
        layer.positions = None if self.positions is None else self.positions.clone()
        layer.per_slot = {name: x.clone() for name, x in self.per_slot.items()}
        layer.state = {name: x.clone() for name, x in self.state.items()}
        layer.length, layer.is_initialized = self.length, self.is_initialized
        return layer

    # ------------------------------------------------------------------------- transformers' interface, not used here

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a Memory fills its layers itself")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("Memory.update writes to its layers")

    def get_seq_length(self) -> int:
        raise NotImplementedError("the length is that of the Memory")

    get_max_length = get_max_cache_shape = get_mask_sizes = get_seq_length


def _picked(x: Tensor, slots_BGC: Tensor) -> Tensor:
    """Numbers [B, G, K] or [B, G, R, K] of the given slots."""
    index = slots_BGC if x.dim() == 3 else slots_BGC[:, :, None].expand(-1, -1, x.shape[2], -1)
    return x.gather(-1, index)
