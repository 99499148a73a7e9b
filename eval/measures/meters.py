"""What a measurement watches beside its result: peak memory, and how far it is."""

from __future__ import annotations

import contextlib
import sys
import time
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


class Progress:
    """How far one row is, on stderr, once it has taken a few seconds: in place in a terminal, else now and then."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done = label, total, 0
        self.live = sys.stderr.isatty()
        self.every = 0.5 if self.live else 15.0
        self.started = time.monotonic()
        self.next = self.started + 3.0
        self.shown = False

    def add(self, tokens: int) -> None:
        self.done += tokens
        now = time.monotonic()
        if now < self.next:
            return
        self.next, self.shown = now + self.every, True
        speed = self.done / (now - self.started)
        line = (
            f"{self.label}: {self.done / self.total:4.0%} of {self.total:,} tokens, {speed:,.0f} tokens/s, "
            f"{(self.total - self.done) / speed:.0f} s left"
        )
        print(f"\r{line}\033[K" if self.live else line, file=sys.stderr, end="" if self.live else "\n", flush=True)

    def close(self) -> None:
        if self.live and self.shown:
            print("\r\033[K", file=sys.stderr, end="", flush=True)
