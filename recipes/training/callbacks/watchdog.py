"""Ends a run within bounded time if a rank hangs: the others wait for it in a collective that may never return."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from recipes.training.callbacks.ending import EndsWithTheRun
from sinkmodel.console import say


class Watchdog(EndsWithTheRun):
    """Ends the process with exit code 1 if no micro-batch is finished for `timeout` seconds.

    Each rank runs its own watchdog with the same timeout, so that a hang of one rank ends the whole run. Each writes
    its stack traces to `RUN/hang-rank0.txt` and so on: those of the rank that hung differ from the others'.
    """

    def __init__(self, run: Path, timeout: float):
        self.run, self.timeout = run, timeout
        self.beat, self.step = 0.0, 0
        self._ended = threading.Event()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.beat, self.step = time.monotonic(), trainer.global_step
        threading.Thread(target=self._watch, args=(trainer.global_rank,), name="watchdog", daemon=True).start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.moved()
        self.step = trainer.global_step

    def moved(self) -> None:
        """Restart the timeout. For other work that takes long and makes progress."""
        self.beat = time.monotonic()

    def end(self) -> None:
        self._ended.set()

    def _dump(self, rank: int) -> None:
        with (self.run / f"hang-rank{rank}.txt").open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)

    def _watch(self, rank: int) -> None:
        while not self._ended.wait(min(1.0, self.timeout / 10)):
            if time.monotonic() - self.beat > self.timeout:
                # The dump may hang too, if the file system does: wait for it only 10 seconds.
                dump = threading.Thread(target=self._dump, args=(rank,), daemon=True)
                dump.start()
                dump.join(10)
                say(
                    f"no progress for {self.timeout:.0f} s after step {self.step}: a rank hangs, or a step takes "
                    f"longer than training.timeout; {self.run}/hang-rank*.txt show what each rank was doing; "
                    "resume with the same command",
                )
                os._exit(1)
