"""Risk: bf16 on a GPU trains another model: a wrong scale, a softmax or a loss in half precision, a broken compile.

What a GPU's losses are to the last digit is not known before one has run this. So the golden losses below are those of
a CPU in fp32, which every device must meet in fp32; and bf16 is compared with fp32 on the same device.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench.gpu.machine import DEVICE, sized
from sinkmodel.checkpoint import read_metrics
from tests import tiny
from tests.recipes.runs import train

STEPS, EVERY = 12, 3
COMPILE = sized(True, False)
# Mean losses of steps 1–3, 4–6, 7–9, 10–12.
GOLDEN = {"token": [6.1321, 5.5058, 5.1571, 4.9883], "logit": [6.1427, 5.5279, 5.1823, 5.0168]}
FP32_BOUND = 5e-3  # between devices
BF16_BOUND = 1e-2  # between bf16 and fp32; on a CPU it is 5e-4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.prepared(tmp_path_factory.mktemp("prepared") / "data")


def losses(data: Path, run: Path, sink: str, precision: str) -> list[float]:
    train(
        data,
        run,
        sink__kind=sink,
        schedule__steps=STEPS,
        logging__every=EVERY,
        training__device=DEVICE,
        training__precision=precision,
        training__compile=COMPILE,
        validation__every=1000,
        checkpoints__every=1000,
    )
    return [float(row["loss"]) for row in read_metrics(run) if row["loss"]]


@pytest.mark.parametrize("sink", GOLDEN)
def test_bf16_trains_as_fp32_does_and_fp32_as_on_a_cpu(data, tmp_path, sink):
    fp32 = losses(data, tmp_path / "fp32", sink, "fp32")
    bf16 = losses(data, tmp_path / "bf16", sink, "bf16")
    assert len(fp32) == len(bf16) == STEPS // EVERY
    assert all(map(math.isfinite, bf16))
    assert fp32 == pytest.approx(GOLDEN[sink], abs=FP32_BOUND)
    assert bf16 == pytest.approx(fp32, abs=BF16_BOUND)
    assert bf16 != fp32, "bf16 was not used"
    assert bf16 == sorted(bf16, reverse=True), "the loss falls"
    assert bf16[-1] < bf16[0] - 0.3
