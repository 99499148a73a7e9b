"""Read a GGUF file with transformers without repeating the same work many times."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()


@contextmanager
def remembered() -> Iterator[None]:
    """In the block, a GGUF file is parsed once and the table of its tensor names is built once. Then both are dropped.

    transformers 5.23 (modeling_gguf_pytorch_utils.py) makes a `GGUFReader` for the config, the weights and the
    tokenizer, and each parses every token of the vocabulary. Its `get_gguf_hf_weights_map` builds the table again for
    every module of the model: 397 times for SmolLM2-135M. The results do not change in between. transformers imports
    both names from `gguf` at each call, so it uses the cached functions that are put in their place here.
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
