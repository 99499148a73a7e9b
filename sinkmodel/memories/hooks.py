"""How a memory takes part in a forward: an attention function that shows it every layer's queries.

transformers looks up the attention function by name in every layer. For the time of one forward that name is ours; the
function calls the one that the model had, with a mask of the memory's, and then shows the memory what it was given.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from sinkmodel.memories.memory import Memory

OBSERVED = "sinkmodel_observed"  # registered without a mask function, so transformers makes no mask

_CURRENT: ContextVar[tuple[Memory, str] | None] = ContextVar(OBSERVED, default=None)


@contextmanager
def observed(memory: Memory, model: Any) -> Iterator[None]:
    """Let every layer of a forward inside pass through `memory.attend`; the model is as before afterwards."""
    name = model.config._attn_implementation
    token = _CURRENT.set((memory, name))
    model.config._attn_implementation = OBSERVED
    try:
        yield
    finally:
        model.config._attn_implementation = name
        _CURRENT.reset(token)


def _observed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Any]:
    current = _CURRENT.get()
    if current is None:
        raise RuntimeError(f"the attention {OBSERVED!r} works only inside of a forward with a Memory")
    memory, name = current
    return memory.attend(_function(module, name), module, query, key, value, kwargs)


def _function(module: Any, name: str) -> Any:
    """The attention function that a module has under its own name; "eager" is written in the file of its model."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


AttentionInterface.register(OBSERVED, _observed_attention)
