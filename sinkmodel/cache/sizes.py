"""The memory that tensors take."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory that tensors take. Memory that several of them share is counted once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
