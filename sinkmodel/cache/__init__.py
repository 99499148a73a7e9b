"""The streaming cache: a hook in the model's forward, the plan of each forward, and the state of the stream."""

from sinkmodel.cache.cache import StreamingCache

__all__ = ["StreamingCache"]
