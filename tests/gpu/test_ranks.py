"""Risk: two ranks under NCCL hang, or train another model than one rank does."""

from __future__ import annotations

import pytest
import torch

from bench.gpu.machine import DEVICE, sized
from sinkmodel.checkpoint import read_metrics
from tests import tiny
from tests.recipes.runs import complete, train

GPUS = 2
BOUND = 2e-3  # between losses in fp32: two ranks add in another order


@pytest.mark.two_gpus
def test_two_ranks_train_as_one_does(tmp_path):
    if torch.cuda.device_count() < sized(GPUS, 0):
        pytest.skip(f"NOT RUN: two ranks under NCCL; this machine has {torch.cuda.device_count()} GPU, it takes {GPUS}")
    data = tiny.prepared(tmp_path / "data")
    settings = {"schedule__steps": 4, "logging__every": 1, "training__device": DEVICE, "training__precision": "fp32"}
    one = train(data, tmp_path / "one", **settings)
    complete(data, tmp_path / "two", GPUS, **settings)
    runs = one, tmp_path / "two"
    first, second = ([float(row["loss"]) for row in read_metrics(run) if row["loss"]] for run in runs)
    assert len(first) == 4
    assert second == pytest.approx(first, abs=BOUND)
