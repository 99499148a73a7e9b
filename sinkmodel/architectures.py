"""Import this module so that transformers knows models with a sink in their softmax; their config.json names it.

`sinkmodel.softmax_sinks.architectures` defines them.
"""

from sinkmodel.softmax_sinks.architectures import (  # noqa: F401
    FIELDS,
    PARAMETER,
    SinkGPTNeoXConfig,
    SinkGPTNeoXForCausalLM,
    SinkLlamaConfig,
    SinkLlamaForCausalLM,
    attentions_of,
    sink_shape,
)
