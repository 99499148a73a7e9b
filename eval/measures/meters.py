"""Memory that a measurement holds: now, and at its peak."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path
from typing import Any

import torch


class PeakMemory:
    """Peak memory in bytes since this object was made: of the GPU's allocator, or the resident set of this process.

    On Linux the old peak can be reset (proc(5), clear_refs). Elsewhere the peak counts from the start of the process,
    and `forgets` is False. `before` is the number of bytes held when the object is made.
    """

    def __init__(self, device: Any):
        self.device, self.forgets = device, True
        self.before = memory_now(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        except OSError:
            self.forgets = False

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        kept = _status("VmHWM:")
        return _largest_so_far() if kept is None else kept


def memory_now(device: Any) -> int:
    """Bytes held: of the GPU's allocator, or the resident set of this process (its peak if /proc does not exist)."""
    _give_back()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    held = _status("VmRSS:")
    return _largest_so_far() if held is None else held


def _give_back() -> None:
    """Return freed memory to the system, so that it is not counted as held. Only glibc can do this for C memory."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None if the file or the field does not exist."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        return int(status.split(field)[1].split()[0]) * 1024
    except (OSError, IndexError):
        return None


def _largest_so_far() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
