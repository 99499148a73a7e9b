"""Streams without end: `Stream`, fed tokens or text, gives tokens, text or scores; `sink-stream` is its command."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkmodel.streaming.sampling import Sampler
    from sinkmodel.streaming.stream import Stream

__all__ = ["Sampler", "Stream"]


def __getattr__(name: str) -> Any:
    """What is asked for, when it is: it brings torch and transformers, which --help can do without."""
    if name == "Stream":
        from sinkmodel.streaming.stream import Stream

        return Stream
    if name == "Sampler":
        from sinkmodel.streaming.sampling import Sampler

        return Sampler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
