"""Save a memory as tensors and plain numbers, and check a saved one.

    memory.save("memory.pt")
    memory = SnapKV(model.config, budget=1024)  # the same settings
    memory.load("memory.pt")

`torch.load(..., weights_only=True)` can read the file, so no code from an untrusted file runs. A memory can be saved
before its prompt has ended.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sinkmodel.errors import UserError
from sinkmodel.memories.layer import MemoryLayer

FORMAT = "sinkmodel-memory-1"
NUMBERS = ("sample", "columns", "expected", "ended", "since", "torn", "scale", "softcap")
ROWS = ("seen", "kept", "budgets", "shift")  # one number per row
SLOTS = ("keys", "values", "positions")


def state_of(memory: Any) -> dict[str, Any]:
    """The content of a file: format, settings, numbers, rows and layers."""
    return {
        "format": FORMAT,
        "settings": memory.settings(),
        "numbers": {name: getattr(memory, name) for name in NUMBERS},
        "rows": {name: list(getattr(memory, name)) for name in ROWS},
        "layers": [_layer(layer) for layer in memory.layers],
    }


def _layer(layer: MemoryLayer) -> dict[str, Any]:
    slots = {name: getattr(layer, name) for name in SLOTS if getattr(layer, name) is not None}
    return {
        "length": layer.length,
        "slots": {name: x[:, :, : layer.length].clone() for name, x in slots.items()},
        "per_slot": {name: x[..., : layer.length].clone() for name, x in layer.per_slot.items()},
        "state": {name: x.clone() for name, x in layer.state.items()},
    }


def check_state(state: Any, settings: dict[str, Any], depth: int) -> None:
    """Raise UserError if `state` is not a valid state of a memory with these settings."""
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("settings"), dict):
        raise UserError("this is not a saved memory; give what Memory.state_dict() returned")
    for key, ours in settings.items():
        theirs = state["settings"].get(key)
        if theirs != ours:
            raise UserError(f"the saved memory has {key} {theirs}, this one {ours}; use the saved settings")
    if not _sound(state, depth):
        raise UserError("the saved memory is damaged; restore an older one")


def _sound(state: dict[str, Any], depth: int) -> bool:
    numbers, rows, layers = (state.get(name) for name in ("numbers", "rows", "layers"))
    if not isinstance(numbers, dict) or not isinstance(rows, dict) or not isinstance(layers, list):
        return False
    if set(numbers) != set(NUMBERS) or set(rows) != set(ROWS) or len(layers) != depth:
        return False
    seen = rows["seen"]
    if not isinstance(seen, list) or any(not isinstance(rows[name], list) for name in ROWS):
        return False
    if any(len(rows[name]) not in (0, len(seen)) for name in ROWS):
        return False
    return all(_sound_layer(layer, len(seen)) for layer in layers)


def _sound_layer(layer: Any, rows: int) -> bool:
    if not isinstance(layer, dict) or set(layer) != {"length", "slots", "per_slot", "state"}:
        return False
    length, slots = layer["length"], layer["slots"]
    tensors = [*slots.values(), *layer["per_slot"].values(), *layer["state"].values()]
    if not isinstance(length, int) or not all(isinstance(x, Tensor) and len(x) == rows for x in tensors):
        return False
    if length == 0:
        return not slots
    if set(slots) != set(SLOTS) or any(x.shape[-1] != length for x in layer["per_slot"].values()):
        return False
    heads = slots["positions"].shape[1]
    return all(slots[name].shape[1:3] == (heads, length) for name in SLOTS)


def restore(memory: Any, state: dict[str, Any]) -> None:
    """Restore a checked state in a memory that was just reset."""
    for name in NUMBERS:
        setattr(memory, name, state["numbers"][name])
    for name in ROWS:
        setattr(memory, name, list(state["rows"][name]))
    for layer, saved in zip(memory.layers, state["layers"]):
        layer.clear()
        for name, x in saved["slots"].items():
            setattr(layer, name, x.clone())
        layer.length, layer.is_initialized = saved["length"], bool(saved["length"])
        layer.per_slot = {name: x.clone() for name, x in saved["per_slot"].items()}
        layer.state = {name: x.clone() for name, x in saved["state"].items()}
