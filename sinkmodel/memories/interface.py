"""The part of a memory that transformers calls between forwards: lengths, rows, beams; and what a user asks of it."""

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
from sinkmodel.errors import UserError
from sinkmodel.memories.layer import MemoryLayer
from sinkmodel.memories.saved import FORMAT, check_state, restore, state_of
from sinkmodel.memories.selection import EMPTY
from sinkmodel.model_support import signature

TAKES_BACK = {  # modes of `generate` that crop the cache, and what asks for them
    "assisted_generation": "assistant_model, prompt_lookup_num_tokens and assistant_early_exit",
    "contrastive_search": "penalty_alpha",
}
OF_MODEL = ("model", "traits", "piece", "forward_of_model")  # what a memory knows of the model that reads
LISTS = ("seen", "kept", "budgets", "shift")  # one number for each row


class MemoryInterface(Cache):
    """Base of `Memory`; its attributes are declared there."""

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

    # --------------------------------------------------------------------------------------------- what a user asks

    @property
    def bytes_held(self) -> int:
        """Memory of all that is held: keys, values, positions, empty slots, and what the method remembers."""
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self._tensors()}
        return sum(storages.values())

    @property
    def bytes_kept(self) -> int:
        """Memory of the keys and values of tokens alone, without empty slots."""
        total = 0
        for layer in self.layers:
            if layer.keys is not None:
                full = int((layer.held_positions() != EMPTY).sum())
                total += full * (layer.keys.shape[-1] + layer.values.shape[-1]) * layer.keys.element_size()
        return total

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            yield from layer.tensors()

    def kept_positions(self, layer: int, row: int = 0) -> list[list[int]]:
        """The positions in the text of the tokens that are held, ascending, for each KV head of a layer."""
        positions = self.layers[layer].held_positions()[row]
        return [sorted(p for p in head if p != EMPTY) for head in positions.tolist()]

    def fork(self) -> Any:
        """An independent copy: many questions to one compressed context."""
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
        return self.fork()  # not of the model, to which a memory has references

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: the memory without its model."""
        return {**vars(self), **dict.fromkeys(OF_MODEL), "modules": {}}

    @contextmanager
    def on(self, model: Any) -> Iterator[Any]:
        """Let every `model.generate` inside start with this memory, empty: for pipelines, which take no cache."""
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
            if before is not None:  # of another memory around this one
                model.generate = before

    # ----------------------------------------------------------------------------------------------- saving a memory

    def settings(self) -> dict[str, Any]:
        """What must be the same for a saved memory to be continued."""
        given = {name: getattr(self, name) for name in self.SETTINGS}
        return {"memory": self.name, "model": signature(self.config), **given}

    def state_dict(self) -> dict[str, Any]:
        """What is held, as tensors and plain numbers: `torch.load(..., weights_only=True)` reads it."""
        return state_of(self)

    def load_state_dict(self, state: Any) -> None:
        """Continue with what `state_dict` returned; UserError, and nothing changed, if it does not fit."""
        check_state(state, self.settings(), len(self.layers))
        self.reset()
        restore(self, state)

    def save(self, path: str | Path) -> None:
        """Write what is held to a file, which is there whole or not at all."""
        from sinkmodel.files import atomic_file

        with atomic_file(Path(path)) as file:
            torch.save(self.state_dict(), file)

    def load(self, path: str | Path) -> None:
        """Continue with what `save` wrote, by a memory of the same settings; UserError if it does not fit."""
        self.load_state_dict(read_state(Path(path), FORMAT, "memory", "Memory.save"))

    # ------------------------------------------------------------------------------------------ what transformers asks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each row so far, pads counted: `generate` slices its prompt by this."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """−1: no limit of its own."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 4

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys that come back from `update`, and an offset with which a causal mask lets all of them be seen."""
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
        """Whether the tokens after the prompt can be taken back: not if they may have evicted others."""
        return self.ended and self.interval is None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest −`tokens_to_remove` tokens of each row, down to the end of the prompt.

        Raises UserError if they have been compressed, or if others were evicted for them.
        """
        count = -tokens_to_remove
        if count == 0:
            return
        after = self.layers[0].length - max(min(n, b) for n, b in zip(self.kept, self.budgets)) if self.ended else 0
        if not self.is_croppable or not 0 < count <= after:
            raise UserError(
                f"{self.name} can take back {after if self.is_croppable else 0} tokens, those after the prompt; got "
                f"{tokens_to_remove}. Keep a fork() from before instead"
            )
        for layer in self.layers:
            layer.crop(count)
        self.columns -= count
        self.seen = [n - count for n in self.seen]
        self.kept = [n - count for n in self.kept]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r becomes what row beam_idx[r] was: beam search."""
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
        """UserError if `generate` was given a prompt that has nothing new for a used memory."""
        if new is not None and new <= 0:
            raise UserError(
                f"this {self.name} has read {self.columns} tokens and the prompt has only {self.columns + new}: "
                "generate takes a prompt as the whole text so far, with new tokens at its end; append to that text, or "
                "reset() the memory for another prompt"
            )

    def check_generation(self, mode: str, prompt: int | None, most: int) -> None:
        """What `generate` is about to do: it tells where the prompt ends."""
        if mode in TAKES_BACK:
            raise UserError(
                f"{mode.replace('_', ' ')} takes tokens back, which {self.name} cannot do; leave out {TAKES_BACK[mode]}"
            )
        if prompt is None or self.ended:
            return
        if prompt <= 1 and not self.columns:
            raise UserError(f"generate was given no prompt for {self.name} to read; give input_ids of several tokens")
        if prompt > self.columns:
            self.expected = prompt
