"""A memory with a user's scorer: a function, or an object with kvpress's method `score`.

    Scored(model, lambda module, hidden_states, keys, values, attentions, kwargs: -keys.norm(dim=-1), budget=256)
    Scored(model, KnormPress(), budget=256)          # an unmodified press of kvpress; its own ratio is ignored

A scorer gets the attention module; the hidden states of the prompt that went into it, [B, N, hidden]; keys and values
after RoPE, [B, G, N, D]; None for the attention; and `kwargs` with `position_embeddings`, the cos and sin of the whole
prompt. During the call the module has the attribute `rotary_emb`. The scorer returns [B, G, N]; the highest are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from sinkmodel.errors import UserError
from sinkmodel.memories.hooks import attention_modules
from sinkmodel.memories.layer import MemoryLayer
from sinkmodel.memories.memory import Memory

Scorer = Callable[[Any, Tensor, Tensor, Tensor, None, dict[str, Any]], Tensor]


class Scored(Memory):
    """A memory that keeps the tokens with the highest scores of a user's scorer. Evicted tokens are really deleted.

    Args:
        scorer: a function, or an object with a method `score`, as the module's docstring describes.

    The other arguments are those of `Memory`. A prompt that comes in several forwards is scored when it ends, and its
    hidden states are kept until then. Empty slots of padded rows are never kept, whatever their score. If the scorer
    returns another shape, or numbers that are not finite, the memory is empty again, as after `reset`.
    """

    def __init__(self, config: Any, scorer: Scorer | Any, budget: int | None = None, **settings: Any):
        super().__init__(config, budget, **settings)
        self.score: Scorer = getattr(scorer, "score", scorer)
        if not callable(self.score):
            raise UserError(f"a scorer must be a function or have a method score; this is {scorer!r}")

    observes = False  # instead, hooks on the attention modules record hidden states
    compresses_in_attention = False  # layers are compressed after the module has run

    def scores(self, layer: MemoryLayer) -> Tensor:
        keys, values = layer.held()
        module = self.modules[self.index_of(layer)]
        kwargs = {"position_embeddings": (layer.state["cos"], layer.state["sin"])} if "cos" in layer.state else {}
        assert self.model is not None
        with with_rotary(module, self.model()):
            scores = self.score(module, layer.state["hidden"], keys, values, None, kwargs)
        if not isinstance(scores, Tensor) or scores.shape != keys.shape[:3]:
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise self.unusable(
                f"the scorer returned {shape} for keys {tuple(keys.shape)}; return {tuple(keys.shape[:3])}"
            )
        return scores

    @contextmanager
    def around(self, model: Any) -> Iterator[None]:
        with super().around(model), ExitStack() as stack:
            if not self.ended:
                for module in attention_modules(model).values():
                    stack.callback(module.register_forward_hook(self._after_module, with_kwargs=True).remove)
            yield

    def _after_module(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        layer = self.layers[module.layer_idx]
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        grow(layer.state, "hidden", hidden)
        places = kwargs.get("position_embeddings")
        if places is not None:
            rows = len(hidden)
            for name, x in zip(("cos", "sin"), places):
                grow(layer.state, name, x.expand(rows, -1, -1))
        assert self.piece is not None
        if self.piece.ends_prompt:
            self._compress(layer, self.piece.seen)


@contextmanager
def with_rotary(module: Any, model: Any) -> Iterator[None]:
    """In the block, an attention module has its model's `rotary_emb`, which presses use, but not as a submodule."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None or hasattr(module, "rotary_emb"):
        yield
        return
    object.__setattr__(module, "rotary_emb", rotary)
    try:
        yield
    finally:
        object.__delattr__(module, "rotary_emb")


def grow(state: dict[str, Tensor], name: str, more: Tensor) -> None:
    """Append tokens [B, N, …] to those already in `state[name]`."""
    state[name] = torch.cat([state[name], more], dim=1) if name in state else more
