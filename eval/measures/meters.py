"""What a measurement watches beside its result: peak memory."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any


class PeakMemory:
    """Peak memory from here on: of the GPU's allocator, or the resident set of this process.

    Linux can forget the old peak (proc(5), clear_refs); elsewhere it is the peak since the process began.
    """

    def __init__(self, device: Any):
        self.device = device
        if device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(device)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        if self.device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self.device)
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
