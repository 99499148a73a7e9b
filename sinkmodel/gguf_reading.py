"""Reading a GGUF file with transformers, without doing the same work again and again."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()


@contextmanager
def remembered() -> Iterator[None]:
    """Inside, a GGUF file is parsed once, and the table of its tensors' names is built once; after it both are
    forgotten.

    transformers 5.23 (modeling_gguf_pytorch_utils.py) makes a `GGUFReader` for the config, for the weights and for the
    tokenizer, each of which parses every token of the vocabulary; and `get_gguf_hf_weights_map` builds the table anew
    for every module of the model: 397 times for SmolLM2-135M. Neither depends on anything that changes in between. Both
    names are imported from `gguf` at each call, so that a function put in their place is used.
    """
    import gguf

    with _LOCK:
        reader, table = gguf.GGUFReader, gguf.get_tensor_name_map
        gguf.GGUFReader = functools.lru_cache(maxsize=1)(reader)
        gguf.get_tensor_name_map = functools.lru_cache(maxsize=1)(table)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = reader, table
