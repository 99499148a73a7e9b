"""The streaming cache: the hook in a model's forward, the plan of what comes next, and the state of the stream."""

from sinkmodel.cache.cache import StreamingCache

__all__ = ["StreamingCache"]
