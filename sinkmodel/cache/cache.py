"""`StreamingCache`: an endless stream through an unmodified transformers model, at constant cost.

    cache = StreamingCache(model.config, budget=1024, sinks=1)
    model(input_ids=ids, past_key_values=cache)                    # any number of tokens, again and again
    model.generate(ids, past_key_values=cache, max_new_tokens=64)

It keeps S sinks and the W = C − S latest keys in C slots per layer and KV head, allocated once (StreamingLLM, section
3.2; DESIGN.md, "Only sinks move"). To *turn* a key is to rotate it by RoPE from one position to another. Window keys
keep the rotation that the model gave them. From the first eviction on, the S sink keys are turned at every step, so
that their positions come right before the window. They are always turned from their *originals*, copies of the sink
keys as the model first rotated them. That costs O(S) work per step, and rounding errors do not add up. From time to
time positions are counted from a new origin, and window keys are turned for that. It happens to a window key at most
once, and positions stay small however long the stream is.

This file has the settings, and the methods that transformers and the hook call. A forward goes through `hook`, which
hands it over, `forward`, which runs it, `inputs`, which checks the input, `plan`, which decides, and `state` and
`layer`, which move keys.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from sinkmodel.cache.forward import run_forward
from sinkmodel.cache.hook import install_hook
from sinkmodel.cache.plan import Ring
from sinkmodel.cache.serialization import FORMAT, check_state, read_state, settings_of
from sinkmodel.cache.sizes import bytes_of
from sinkmodel.cache.state import State
from sinkmodel.checks import one_of
from sinkmodel.choices import Convention, Positions
from sinkmodel.errors import UserError
from sinkmodel.files import atomic_file
from sinkmodel.model_support import check_config, signature
from sinkmodel.sinks import IN_SOFTMAX, kind_of, sinks_to_keep

MODES_THAT_CROP = {  # generation modes that remove tokens from the cache, and the arguments that select them
    "assisted_generation": "assistant_model, prompt_lookup_num_tokens, assistant_early_exit and use_mtp",
    "contrastive_search": "penalty_alpha",
}


class StreamingCache(Cache):
    """Sinks and a ring of recent keys, for `past_key_values` of any transformers model with RoPE, and of MPT.

    Args:
        config: the model's config (`model.config`), or the model itself if its class is not one of transformers'.
        budget: C, the slots of a KV head. It counts the sinks and the current token.
        sinks: S, the number of leading tokens of each row that are never evicted. None takes the model's own sinks: 1
            if it has none, 0 if its sink is in the softmax, which takes no slot. For any other model, 0 makes the cache
            a plain sliding window.
        positions: "cache": sinks are right before the window (StreamingLLM). "text": every key is at its true distance.
        convention: "inclusive": a query sees C keys, its own included. "paper": C + 1, as in the paper's code, which
            evicts after the forward (DESIGN.md, "The budget includes the current token").

    Each row is a stream of its own. Pads take no slot: a 2-D `attention_mask` marks them (left padding or any other),
    so each row has its own sinks. Pads must be masked in the forward that feeds them. A later mask that hides tokens
    already fed is rejected. A forward longer than the window is fed in pieces, with the same result as token by token.
    `position_ids` are ignored, because the cache numbers the tokens. Logits have no gradients. After an interrupted
    forward, `seen` shows how many tokens were fed. After beam search the rows are the beams.

    Making a cache installs a hook in the forward of the model's class (`sinkmodel.cache.hook`, which also removes it).

    Raises:
        UserError: at construction for invalid settings and, by name, for models that cannot be streamed; in a forward,
            before anything is written, for inputs that cannot continue the stream.
    """

    def __init__(
        self,
        config: Any,
        budget: int = 1024,
        sinks: int | None = None,
        positions: Positions = "cache",
        convention: Convention = "inclusive",
    ):
        model_or_config, config = config, getattr(config, "config", config)
        sinks = sinks_to_keep(config) if sinks is None else sinks
        try:
            budget, sinks = operator.index(budget), operator.index(sinks)
        except TypeError:
            raise UserError(f"budget and sinks must be whole numbers, not {budget!r} and {sinks!r}") from None
        one_of("positions", positions, Positions)
        one_of("convention", convention, Convention)
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
            warnings.warn("sinks=0 is the plain window: most models fail from the first eviction on", stacklevel=2)
        ring = Ring(self.slots, sinks, text=positions == "text", ordered=self.config.model_type == "mpt")
        self.state = State(self.config, ring)
        super().__init__(layers=self.state.layers)
        install_hook(model_or_config)

    @property
    def window(self) -> int:
        """W = C − S."""
        return self.budget - self.sinks

    @property
    def seen(self) -> list[int]:
        """Number of tokens that each row has been fed, without pads."""
        return self.state.seen

    @property
    def torn(self) -> bool:
        """True if a forward was interrupted after changing keys that are still needed: the stream cannot continue."""
        return self.state.torn

    @property
    def bytes_held(self) -> int:
        """Bytes of everything that is held: all slots, and the sinks' keys as the model rotated them."""
        return bytes_of(self.state.tensors())

    @property
    def bytes_kept(self) -> int:
        """Bytes of only the keys and values of tokens, without empty slots."""
        tokens = sum(min(seen, self.slots) for seen in self.seen)
        layers = self.state.layers if tokens else []
        return sum(tokens * x[0, :, 0].nbytes for layer in layers for x in (layer.keys, layer.values))

    @property
    def keys_kept(self) -> float:
        """Number of tokens that a KV head holds, as a mean over the rows."""
        return fmean(min(seen, self.slots) for seen in self.seen) if self.seen else 0.0

    # ------------------------------------------------------------------------------------------- what the hook calls

    @property
    def in_forward(self) -> bool:
        return self.state.plan is not None

    def run_forward(self, forward: Callable[..., Any], model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of `model(...)` with this cache; `sinkmodel.cache.hook` calls it."""
        return run_forward(self, self.state, forward, model, args, kwargs, torch.compiler.is_compiling())

    def check_new_tokens(self, new: int | None) -> None:
        """Raise UserError if the prompt of `generate` has no new tokens for a used cache.

        transformers takes the prompt as the whole text so far and feeds its last `new` tokens, those that the cache
        does not hold. If `new` were 0 or less, that slice would be the whole prompt, a wrong part of it, or empty.
        """
        if new is not None and new <= 0:
            held = self.state.columns
            raise UserError(
                f"this StreamingCache already holds {held} tokens and the prompt has only {held + new}: generate takes "
                "a prompt as the whole text so far, with new tokens at its end; append to that text, or call reset() "
                "on the cache to start from the beginning"
            )

    def check_generation(self, mode: str, prompt: int | None, most: int) -> None:
        """Raise UserError, before the first token, if `generate` would remove tokens after the first eviction.

        `most` is the number of tokens that `generate` may feed. A used cache may already hold some of them. `prompt` is
        part of the interface of the hook (`ForwardCache`), and is not needed here.
        """
        if mode in MODES_THAT_CROP and (tokens := self.state.columns + most + 1) > self.slots:
            raise UserError(
                f"{mode.replace('_', ' ')} removes tokens again, which a StreamingCache can do only until it is full: "
                f"this text may become {tokens} tokens long; leave out {MODES_THAT_CROP[mode]}, or use a budget of at "
                f"least {tokens}"
            )

    # ------------------------------------------------------------------------------------- what transformers calls

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Write the keys [B, G, N, D] and values of a layer. Returns the keys and values that its queries see."""
        return self.state.update(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns fed so far, pads included. `generate` slices its prompt by it."""
        return self.state.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """−1: a stream has no end."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 4

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The number of keys that `update` will return for a forward of `query_length` columns, and their offset.

        transformers makes a causal mask from both: it numbers the keys from the offset on, and a query sees the keys
        up to its own column. The offset is such that the last key has the number of the last query.
        """
        plan, end = self.state.plan, self.state.columns + query_length
        held = plan.held if plan is not None else end
        return held, end - held

    @property
    def is_compileable(self) -> bool:
        """False, else `generate` makes masks of its own. `torch.compile` of the model works nevertheless."""
        return False

    @property
    def is_initialized(self) -> bool:
        return self.state.traits is not None

    @property
    def is_croppable(self) -> bool:
        return max(self.seen, default=0) <= self.slots

    @property
    def batch_size(self) -> int:
        return len(self.seen) or -1

    def reset(self) -> None:
        """Begin a new stream with any number of rows. The memory is reused if it fits."""
        self.state.forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the latest −`tokens_to_remove` tokens of each row, as if they had never been fed.

        Raises UserError once something was evicted, since it cannot be restored.
        """
        self.state.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """For beam search: row r becomes a copy of row beam_idx[r]."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.seen:
            self.state.select(torch.arange(len(self.seen))[indices.cpu()].tolist())

    # ----------------------------------------------------------------------------------------------- saving a stream

    def settings(self) -> dict[str, Any]:
        """The settings that must be equal if a saved stream is to continue."""
        return {
            "model": signature(self.config),
            "budget": self.budget,
            "sinks": self.sinks,
            "positions": self.positions,
            "convention": self.convention,
        }

    def state_dict(self) -> dict[str, Any]:
        """The stream as tensors and plain numbers, which `torch.load(..., weights_only=True)` can read."""
        return {"format": FORMAT, "settings": self.settings(), **self.state.to_dict()}

    def load_state_dict(self, state: Any) -> None:
        """Continue a stream that `state_dict` returned. If it does not fit, raises UserError and changes nothing."""
        check_state(state, self.settings(), len(self.layers), self.slots)
        self.state.restore(state)

    def save(self, path: str | Path) -> None:
        """Write the stream to a file atomically."""
        with atomic_file(Path(path)) as file:
            torch.save(self.state_dict(), file)

    @classmethod
    def load(cls, path: str | Path, config: Any) -> StreamingCache:
        """Load a stream that `save` wrote for the same model. Raises UserError for other files and other models."""
        path = Path(path)
        state = read_state(path)
        cache = cls(config, **settings_of(state, path))
        cache.load_state_dict(state)
        return cache
