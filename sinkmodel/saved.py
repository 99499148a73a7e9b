"""A stream in flight as a file: what it holds, and whether it is one that can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sinkmodel.errors import UserError

FORMAT = "sinkmodel-stream-1"
NUMBERS = ("columns", "padded_until", "torn")
ROWS = ("seen", "origin", "turned")  # a number a row
TENSORS = ("keys", "values", "sink_keys")  # where there are rows


def read_state(path: Path) -> dict[str, Any]:
    """The content of a file that `StreamingCache.save` wrote; UserError where it is none, or damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a file that StreamingCache.save wrote") from None
    except Exception as error:  # of a damaged file: anything, from RuntimeError to EOFError
        what = (str(error).splitlines() or [type(error).__name__])[0][:120].rstrip(". ")
        raise UserError(f"{path} is no saved stream, or damaged: {what}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is no saved stream; give a file that StreamingCache.save wrote")
    return state


def check_state(state: Any, settings: dict[str, Any], depth: int, slots: int) -> None:
    """UserError where `state` is not a sound stream of a cache with these settings."""
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("settings"), dict):
        raise UserError("this is no saved stream; give what StreamingCache.state_dict() returned")
    for key, ours in settings.items():
        theirs = state["settings"].get(key)
        if theirs != ours:
            raise UserError(f"the saved stream has {key} {theirs}, this cache {ours}; make the cache as it was")
    rows = state.get("seen")
    sound = isinstance(rows, list) and all(isinstance(state.get(name), int) for name in NUMBERS)
    sound = sound and all(_integers(state.get(name), len(rows or ())) for name in ROWS)
    if sound and rows:
        sound = _sound([state.get(name) for name in TENSORS], (depth, len(rows), settings["sinks"], slots))
    if not sound:
        raise UserError("the saved stream is damaged: its parts do not fit each other; restore an older one")


def _integers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(isinstance(x, int) for x in values)


def _sound(tensors: list[Any], sizes: tuple[int, int, int, int]) -> bool:
    """[L, B, G, C, D], [L, B, G, C, V] and [L, B, G, S, D], with L, B, S and C given, all finite."""
    if not all(isinstance(x, torch.Tensor) and x.dim() == 5 for x in tensors):
        return False
    (keys, values, sink_keys), (L, B, S, C) = tensors, sizes
    G, D = keys.shape[2], keys.shape[4]
    shapes = keys.shape == (L, B, G, C, D), values.shape[:4] == (L, B, G, C), sink_keys.shape == (L, B, G, S, D)
    return all(shapes) and all(bool(torch.isfinite(x).all()) for x in tensors)
