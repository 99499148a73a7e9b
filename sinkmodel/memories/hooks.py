"""How a memory takes part in a forward: through an attention function that gets the queries of every layer.

In every layer, transformers looks up the attention function by name. During a forward that name is ours. Our function
calls the model's own one with the memory's mask, and passes the same input to the memory.

The name belongs to the model, so threads that read with memories on the same model take turns (`alone`). If another
thread runs a forward without a memory at that time, it is refused.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinkmodel.cache.inputs import MASKLESS
from sinkmodel.errors import UserError

OBSERVED = "sinkmodel_observed"  # registered without a mask function, so transformers makes no mask


class Observer(Protocol):
    """An object that observes the attention of a forward: a `Memory`."""

    def attend(self, attention: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, kwargs: Any) -> Any:
        """The output of `attention`, the model's own function, for the input of a layer."""


_CURRENT: ContextVar[tuple[Observer, str] | None] = ContextVar(OBSERVED, default=None)
_LOCKS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()


def alone(model: Any) -> Any:
    """A lock that lets one thread at a time read with a memory on this model."""
    return _LOCKS.setdefault(model, threading.RLock())


@contextmanager
def observed(memory: Observer, model: Any) -> Iterator[None]:
    """In the block, every layer of a forward calls `memory.attend`; afterwards the model is restored.

    If the model has a part for images, the name is changed only in the config of its language part.
    """
    config = model.config.get_text_config()
    name = config._attn_implementation
    token = _CURRENT.set((memory, name))
    config._attn_implementation = OBSERVED
    try:
        yield
    finally:
        config._attn_implementation = name
        _CURRENT.reset(token)


def attention_modules(model: Any) -> dict[int, Any]:
    """The attention modules of a transformers model, by layer, recognised by two attributes."""
    found = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "is_causal")]
    return {module.layer_idx: module for module in found}


class _Ungrouped:
    """A wrapper of an attention module whose query heads do not share keys."""

    num_key_value_groups = 1

    def __init__(self, module: Any):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def grouped_as(module: Any, query_BHND: Tensor, keys_BGKD: Tensor) -> Any:
    """The module for its attention function; if each query head has its own set of keys, one that shares none."""
    apart = keys_BGKD.shape[1] == query_BHND.shape[1] and getattr(module, "num_key_value_groups", 1) > 1
    return _Ungrouped(module) if apart else module


def _observed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Any]:
    current = _CURRENT.get()
    if current is None:
        raise UserError(
            "a memory is reading with this model in another thread; wait until that forward has ended, or load "
            "the model once for each thread"
        )
    memory, name = current
    if name not in MASKLESS:
        return memory.attend(_function(module, name), module, query, key, value, kwargs)
    module.config._attn_implementation = name  # flash attention reads it
    try:
        return memory.attend(_function(module, name), module, query, key, value, kwargs)
    finally:
        module.config._attn_implementation = OBSERVED


def _function(module: Any, name: str) -> Any:
    """The attention function of that name for a module; "eager" is defined in the file of its model."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


AttentionInterface.register(OBSERVED, _observed_attention)
