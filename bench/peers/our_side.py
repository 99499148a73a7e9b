"""`sink-pretrain` as a side of `bench.peers.training`: the command itself, with a callback at the end of each step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.peers.gate import Gate

JOB = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
GATE = Gate(JOB["block"])

from recipes.pretrain import main  # noqa: E402  after the process is pinned
from sinkmodel.imports import slow_imports  # noqa: E402

with slow_imports():  # as the command does
    from lightning.pytorch import Callback

    from recipes.training import run
    from recipes.training.callbacks.steps import at_step_boundary

build_trainer = run.build_trainer


class AtTheGate(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if at_step_boundary(trainer, batch_idx):
            GATE.step()


def with_gate(*args: Any) -> tuple[Any, ...]:
    trainer, *others = build_trainer(*args)
    trainer.callbacks.append(AtTheGate())
    return trainer, *others


run.build_trainer = with_gate  # type: ignore[assignment]
raise SystemExit(main(JOB["argv"]))
