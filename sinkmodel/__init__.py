"""Language models with a trainable attention sink: the sink, the model, the export."""

from sinkmodel.errors import UserError
from sinkmodel.sinks import SinkConfig

__all__ = ["SinkConfig", "UserError"]
