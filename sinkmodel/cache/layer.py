"""The slots of one layer, which hold the keys and values of a stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sinkmodel.cache.plan import Plan


class StreamingLayer(CacheLayerMixin):
    """One layer's ring: `keys` [B, G, C, D] and `values` [B, G, C, V]. Slots [0, S) hold the sinks."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a StreamingCache is allocated at its first forward")

    def allocate(
        self, keys: tuple[int, ...], values: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Fill with zeros of these shapes. The former memory is reused if its shape, dtype and device are the same."""
        with torch.inference_mode(False):  # inference tensors cannot be written outside of inference_mode
            if self.is_initialized and (keys, values, dtype, device) == self._kind():
                self.keys.zero_()
                self.values.zero_()
            else:
                like: dict[str, Any] = {"dtype": dtype, "device": device}
                self.hold(torch.zeros(keys, **like), torch.zeros(values, **like))

    def _kind(self) -> tuple:
        return tuple(self.keys.shape), tuple(self.values.shape), self.keys.dtype, self.keys.device

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Use these tensors as the ring. Their address stays fixed until the next `hold`, as CUDA graphs require."""
        if keys.is_inference():  # inference tensors cannot be written outside of inference_mode
            with torch.inference_mode(False):
                keys, values = keys.clone(), values.clone()
        self.keys, self.values = keys, values
        torch._dynamo.mark_static_address(keys)
        torch._dynamo.mark_static_address(values)
        self.is_initialized = True

    def write(self, plan: Plan, keys_BGND: Tensor, values_BGNV: Tensor) -> None:
        """Write the keys and values of a plan to their slots, without gradients, since a stream has no end."""
        values_BGNV = values_BGNV.to(self.values.dtype)  # under autocast the values may have another dtype
        for ring, new in ((self.keys, keys_BGND.detach()), (self.values, values_BGNV.detach())):
            if plan.slots_N is not None:
                ring.index_copy_(2, plan.slots_N, new)
            elif plan.scatter is not None:
                row, column, slot = plan.scatter
                ring[row, :, slot] = new[row, :, column]

    def read(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """The keys and values of a placed plan. Copies only for ALiBi, which derives distances from the index."""
        if plan.order_BC is not None:
            row = torch.arange(len(self.keys), device=self.keys.device)[:, None]
            keys, values = self.keys[row, :, plan.order_BC], self.values[row, :, plan.order_BC]
            return keys.transpose(1, 2), values.transpose(1, 2)
        if plan.held == self.keys.shape[2]:
            return self.keys, self.values
        return self.keys[:, :, : plan.held], self.values[:, :, : plan.held]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a StreamingCache writes to its layers itself")

    def get_seq_length(self) -> int:
        raise NotImplementedError("the length is that of the StreamingCache")

    get_max_length = get_max_cache_shape = get_mask_sizes = get_seq_length
