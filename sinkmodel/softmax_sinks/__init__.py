"""Sinks in the softmax (`zero`, `logit`, `kv_bias`): one more column of every softmax, in place of a token.

They are an alternative to the sink token, for comparison. A reader of the main line may leave this package out: for a
model with sink tokens, or without a sink, every function here returns None or is not called.

`scores` is the column of a query, `attention` the softmax with it, `architectures` the models that have it.
"""
