"""The methods of a memory that transformers calls between forwards (lengths, rows, beams), and those for users."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from sinkmodel.cache.serialization import read_state
from sinkmodel.cache.sizes import bytes_of
from sinkmodel.errors import UserError
from sinkmodel.memories.layer import MemoryLayer
from sinkmodel.memories.saved import FORMAT, check_state, restore, state_of
from sinkmodel.memories.selection import EMPTY
from sinkmodel.model_support import signature

TAKES_BACK = {  # modes of `generate` that crop the cache, and the arguments that select them
    "assisted_generation": "assistant_model, prompt_lookup_num_tokens and assistant_early_exit",
    "contrastive_search": "penalty_alpha",
}
OF_MODEL = ("model", "traits", "piece", "forward_of_model")  # attributes that refer to the model
LISTS = ("seen", "kept", "budgets", "shift")  # one number per row


class MemoryInterface(Cache):
    """Base class of `Memory`, which sets its attributes."""

    SETTINGS: tuple[str, ...]
    config: Any
    layers: list[MemoryLayer]
    name: str
    columns: int
    seen: list[int]
    kept: list[int]
    budgets: list[int]
    shift: list[int]
    ended: bool
    expected: int | None
    interval: int | None

    # ----------------------------------------------------------------------------------------------------- for users

    @property
    def bytes_held(self) -> int:
        """Bytes of everything that is held: keys, values, positions, empty slots, and the method's own numbers."""
        return bytes_of(x for layer in self.layers for x in layer.tensors())

    @property
    def bytes_kept(self) -> int:
        """Bytes of only the keys and values of tokens, without empty slots."""
        total = 0
        for layer in self.layers:
            if layer.keys is not None:
                full = int((layer.held_positions() != EMPTY).sum())
                total += full * (layer.keys.shape[-1] + layer.values.shape[-1]) * layer.keys.element_size()
        return total

    @property
    def keys_kept(self) -> float:
        """Number of tokens that a head's set holds, as a mean over rows, layers and KV heads.

        If each query head has its own set, it is the mean over these.
        """
        layers = [layer for layer in self.layers if layer.keys is not None]
        if not layers:
            return 0.0
        counts = [(layer.held_positions() != EMPTY).sum(dim=-1) for layer in layers]
        return torch.stack([count.float().mean() for count in counts]).mean().item()

    def kept_positions(self, layer: int, row: int = 0) -> list[list[int]]:
        """For each KV head of a layer, the text positions of the held tokens, ascending."""
        positions = self.layers[layer].held_positions()[row]
        return [sorted(p for p in head if p != EMPTY) for head in positions.tolist()]

    def unusable(self, message: str) -> UserError:
        """The error for scores that cannot be used. Layers may have lost tokens by then, so the memory is emptied."""
        self.reset()
        return UserError(f"{message}. This {self.name} is empty again; read the prompt again")

    def fork(self) -> Any:
        """An independent copy, for example to ask many questions about one compressed context."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, (list, dict)):
                setattr(other, name, copy.copy(value))
        other.layers = [layer.copied() for layer in self.layers]
        return other

    def __copy__(self) -> Any:
        other = type(self).__new__(type(self))
        other.__dict__.update(vars(self))
        return other

    def __deepcopy__(self, memo: Any) -> Any:
        return self.fork()  # does not copy the model, to which a memory refers

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickle, without the model."""
        return {**vars(self), **dict.fromkeys(OF_MODEL), "modules": {}}

    @contextmanager
    def on(self, model: Any) -> Iterator[Any]:
        """In the block, every `model.generate` starts with this memory, emptied. For pipelines, which take no cache."""
        before, generate = vars(model).get("generate"), model.generate

        def with_memory(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("past_key_values") is None:
                self.reset()
                kwargs["past_key_values"] = self
            return generate(*args, **kwargs)

        model.generate = with_memory
        try:
            yield self
        finally:
            del model.generate
            if before is not None:  # set by the block of another memory around this one
                model.generate = before

    # ----------------------------------------------------------------------------------------------- saving a memory

    def settings(self) -> dict[str, Any]:
        """The settings that must be equal if a saved memory is to continue."""
        given = {name: getattr(self, name) for name in self.SETTINGS}
        return {"memory": self.name, "model": signature(self.config), **given}

    def state_dict(self) -> dict[str, Any]:
        """The content as tensors and plain numbers, which `torch.load(..., weights_only=True)` can read."""
        return state_of(self)

    def load_state_dict(self, state: Any) -> None:
        """Continue from what `state_dict` returned. If it does not fit, raises UserError and changes nothing."""
        check_state(state, self.settings(), len(self.layers))
        self.reset()
        restore(self, state)

    def save(self, path: str | Path) -> None:
        """Write the content to a file atomically."""
        from sinkmodel.files import atomic_file

        with atomic_file(Path(path)) as file:
            torch.save(self.state_dict(), file)

    def load(self, path: str | Path) -> None:
        """Continue from what `save` wrote with the same settings. Raises UserError if it does not fit."""
        self.load_state_dict(read_state(Path(path), FORMAT, "memory", "Memory.save"))

    # -------------------------------------------------------------------------------------------- for transformers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns read so far, pads included. `generate` slices its prompt by it."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """−1: a memory has no limit of its own."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 4

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The number of keys that `update` returns, and the offset with which a causal mask shows all of them."""
        held = self.layers[layer_idx].length + query_length
        return held, self.columns + query_length - held

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.columns > 0

    @property
    def batch_size(self) -> int:
        return len(self.seen) or -1

    @property
    def is_croppable(self) -> bool:
        """Whether tokens after the prompt can be removed: not if others may have been evicted for them."""
        return self.ended and self.interval is None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the latest −`tokens_to_remove` tokens of each row, at most down to the end of the prompt.

        Raises UserError if these tokens have been compressed, or if others were evicted for them.
        """
        count = -tokens_to_remove
        if count == 0:
            return
        after = self.layers[0].length - max(min(n, b) for n, b in zip(self.kept, self.budgets)) if self.ended else 0
        if not self.is_croppable or not 0 < count <= after:
            raise UserError(
                f"{self.name} can remove {after if self.is_croppable else 0} tokens, those after the prompt; got "
                f"{tokens_to_remove}. Keep an earlier fork() instead"
            )
        for layer in self.layers:
            layer.crop(count)
        self.columns -= count
        self.seen = [n - count for n in self.seen]
        self.kept = [n - count for n in self.kept]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """For beam search: row r becomes a copy of row beam_idx[r]."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.seen:
            return
        rows = torch.arange(len(self.seen))[indices.cpu()].tolist()
        for layer in self.layers:
            layer.select_rows(rows)
        for name in LISTS:
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in rows] if values else [])

    def check_new_tokens(self, new: int | None) -> None:
        """Raise UserError if the prompt of `generate` has no new tokens for a used memory."""
        if new is not None and new <= 0:
            raise UserError(
                f"this {self.name} has read {self.columns} tokens and the prompt has only {self.columns + new}: "
                "generate takes a prompt as the whole text so far, with new tokens at its end; append to that text, or "
                "reset() the memory for another prompt"
            )

    def check_generation(self, mode: str, prompt: int | None, most: int) -> None:
        """Called before `generate` begins: notes the end of the prompt. Raises UserError for unsupported modes."""
        if mode in TAKES_BACK:
            raise UserError(
                f"{mode.replace('_', ' ')} removes tokens, which {self.name} cannot do; leave out {TAKES_BACK[mode]}"
            )
        if prompt is None or self.ended:
            return
        if prompt <= 1 and not self.columns:
            raise UserError(f"generate got no prompt for {self.name} to read; give input_ids of several tokens")
        if prompt > self.columns:
            self.expected = prompt
