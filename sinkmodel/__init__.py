"""Language models with a trainable attention sink: the sink, the model, the streaming cache, the export."""

from typing import TYPE_CHECKING, Any

from sinkmodel.errors import UserError
from sinkmodel.sinks import SinkConfig

if TYPE_CHECKING:
    from sinkmodel.cache import StreamingCache

__all__ = ["SinkConfig", "StreamingCache", "UserError", "__version__"]

__version__ = "0.1.0"  # the only place: the build reads it here


def __getattr__(name: str) -> Any:
    """Import StreamingCache on first use: it imports torch and transformers, which `--help` does not need."""
    if name == "StreamingCache":
        from sinkmodel.cache import StreamingCache

        return StreamingCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
