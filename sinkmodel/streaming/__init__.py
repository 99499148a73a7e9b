"""Endless streams: `Stream` is fed tokens or text and returns tokens, text or scores. Its command is `sink-stream`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkmodel.streaming.sampling import Sampler
    from sinkmodel.streaming.stream import Stream

__all__ = ["Sampler", "Stream"]


def __getattr__(name: str) -> Any:
    """Import on first use: both import torch and transformers, which `--help` does not need."""
    if name == "Stream":
        from sinkmodel.streaming.stream import Stream

        return Stream
    if name == "Sampler":
        from sinkmodel.streaming.sampling import Sampler

        return Sampler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
