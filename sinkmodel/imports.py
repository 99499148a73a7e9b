"""Importing torch, transformers and Lightning faster at the start of a command."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def slow_imports() -> Iterator[None]:
    """Put the first import of torch and transformers into this block: it then takes about a quarter less CPU time.

    The imports make a million objects that stay until the process ends. Python's garbage collector walks through them
    again and again while they appear, and through all of them in every full collection later. So it is off in the
    block, and afterwards it leaves out the objects that exist (`gc.freeze`). Forked processes then also share their
    memory for longer, since a collection writes to each object that it walks through.

    If transformers is already imported, the block does nothing: the objects of a program that calls us are its own.
    """
    if "transformers" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
