"""The streaming cache: its state, a forward with it, the arithmetic of its ring, and the models that it works for."""

from sinkmodel.cache.streaming_cache import StreamingCache

__all__ = ["StreamingCache"]
