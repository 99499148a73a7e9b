"""A saved stream: reading the file, and checking that the stream can be continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sinkmodel.errors import UserError
from sinkmodel.probe import SAMPLE

FORMAT = "sinkmodel-stream-1"
NUMBERS = ("columns", "padded_until", "torn")
ROWS = ("seen", "origin", "turned")  # one number per row
TENSORS = ("keys", "values", "sink_keys")  # only if there are rows


def read_state(path: Path, form: str = FORMAT, what: str = "stream", by: str = "StreamingCache.save") -> dict[str, Any]:
    """The content of a file of the format `form`; raises UserError if it is another kind of file, or damaged.

    Args:
        what: the kind of content, for messages.
        by: the function that writes such files, for messages.
    """
    from sinkmodel.checkpoint import NOT_A_CHECKPOINT, load_tensors  # loads transformers' modelling code

    remedy = f"give a file that {by} wrote"
    try:
        state = load_tensors(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {remedy}") from None
    except NOT_A_CHECKPOINT:
        raise UserError(f"{path} is not a saved {what}, or it is damaged; {remedy}") from None
    if not isinstance(state, dict) or state.get("format") != form:
        raise UserError(f"{path} is not a saved {what}; {remedy}")
    return state


def settings_of(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """The arguments of the StreamingCache that was saved."""
    settings = state.get("settings")
    kinds = {"budget": int, "sinks": int, "positions": str, "convention": str}
    if not isinstance(settings, dict) or not all(isinstance(settings.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{path} is damaged: its settings are missing; restore an older one")
    return {key: settings[key] for key in kinds}


def check_state(state: Any, settings: dict[str, Any], depth: int, slots: int) -> None:
    """Raise UserError if `state` is not a valid stream of a cache with these settings."""
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("settings"), dict):
        raise UserError("this is not a saved stream; give what StreamingCache.state_dict() returned")
    for key, ours in settings.items():
        theirs = state["settings"].get(key)
        if theirs != ours:
            raise UserError(f"the saved stream has {key} {theirs}, this cache {ours}; use the saved settings")
    rows = state.get("seen")
    sound = isinstance(rows, list) and all(isinstance(state.get(name), int) for name in NUMBERS)
    sound = sound and all(_integers(state.get(name), len(rows or ())) for name in ROWS)
    if sound and rows:
        recorded = state.get("shapes")
        shapes = recorded if isinstance(recorded, dict) else {}
        sound = all(_sound(state.get(name), shapes.get(name)) for name in TENSORS)
        sample = state.get("sample")
        sound = sound and isinstance(sample, list) and len(sample) == SAMPLE
        slots_of = {"keys": slots, "values": slots, "sink_keys": settings["sinks"]}
        sound = sound and all(
            (shapes[name][0], shapes[name][1], shapes[name][3]) == (depth, len(rows), slots_of[name])
            for name in TENSORS
        )
    if not sound:
        raise UserError("the saved stream is damaged: its parts do not fit each other; restore an older one")


def _integers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(isinstance(x, int) for x in values)


def _sound(tensor: Any, shape: Any) -> bool:
    """Whether it is a finite tensor of the recorded shape [L, B, G, slots, D]."""
    if not isinstance(tensor, torch.Tensor) or not isinstance(shape, list) or len(shape) != 5:
        return False
    return list(tensor.shape) == shape and bool(torch.isfinite(tensor).all())
