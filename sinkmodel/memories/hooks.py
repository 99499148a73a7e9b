"""How a memory takes part in a forward: an attention function that shows it every layer's queries.

transformers looks up the attention function by name in every layer. For the time of one forward that name is ours; the
function calls the one that the model had, with a mask of the memory's, and then shows the memory what it was given.

The name belongs to the model, so threads that read with memories on one model take turns (`alone`). A forward without a
memory in another thread, at that very time, is refused.
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
    """What sees the attention of a forward: a `Memory`."""

    def attend(self, attention: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, kwargs: Any) -> Any:
        """The output of `attention`, the model's own function, for what a layer gave it."""


_CURRENT: ContextVar[tuple[Observer, str] | None] = ContextVar(OBSERVED, default=None)
_LOCKS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()


def alone(model: Any) -> Any:
    """A lock: one thread at a time reads with a memory on this model."""
    return _LOCKS.setdefault(model, threading.RLock())


@contextmanager
def observed(memory: Observer, model: Any) -> Iterator[None]:
    """Let every layer of a forward inside pass through `memory.attend`; the model is as before afterwards.

    Of a model with a part that sees images the name is changed in the config of the language part alone.
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
    """The modules of a transformers model that attend, by layer: they all have these two attributes."""
    found = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "is_causal")]
    return {module.layer_idx: module for module in found}


def _observed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Any]:
    current = _CURRENT.get()
    if current is None:
        raise UserError(
            "a memory is reading with this model in another thread; run the model when that forward has ended, or load "
            "it once for each thread"
        )
    memory, name = current
    if name not in MASKLESS:
        return memory.attend(_function(module, name), module, query, key, value, kwargs)
    module.config._attn_implementation = name  # flash attention looks at it
    try:
        return memory.attend(_function(module, name), module, query, key, value, kwargs)
    finally:
        module.config._attn_implementation = OBSERVED


def _function(module: Any, name: str) -> Any:
    """The attention function that a module has under its own name; "eager" is written in the file of its model."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


AttentionInterface.register(OBSERVED, _observed_attention)
