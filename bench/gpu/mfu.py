"""MFU and tokens/s of the recipe for 160M parameters: what sink-pretrain itself logs.

On a GPU this is `sink-pretrain --config pythia-160m --config one-gpu`, bf16 and compiled, with batches of
524,288 tokens. The text is made up, and is read from a prepared folder as in any run.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench.gpu.machine import DEVICE, device_name, sized
from bench.made_up import prepared
from recipes.pretrain import main as sink_pretrain
from sinkmodel.checkpoint import read_metrics

RECIPE = sized(
    "--config pythia-160m --config one-gpu --model.vocabulary 50304 --training.batch_tokens 524288",
    "--config tiny --model.vocabulary 384 --model.layers 2 --model.hidden 64 --training.batch_tokens 1024 "
    "--training.micro_rows 2 --training.precision bf16",
).split()
STEPS, EVERY = sized(60, 6), sized(5, 1)  # a line of the log is the mean over EVERY steps
WARM_UP = 2  # lines left out: they compile
WORDS = sized(200_000, 4000)


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        data, run = prepared(Path(folder) / "data", train_words=WORDS, validation_words=4000), Path(folder) / "run"
        argv = [*RECIPE, "--config=sink-token", f"--training.device={DEVICE}", f"--schedule.steps={STEPS}"]
        argv += [f"--logging.every={EVERY}", "--validation.every=1000000", "--validation.rows=1"]
        argv += ["--checkpoints.every=1000000", "--checkpoints.keep_every=0", "--checkpoints.early=false"]
        argv += [f"--data.path={data}", f"--output={run}"]
        if code := sink_pretrain(argv):
            raise RuntimeError(f"sink-pretrain ended with exit code {code}; the lines above name the cause")
        lines = [row for row in read_metrics(run) if row["loss"]][WARM_UP:]
    mfu = sorted(float(line["mfu"]) for line in lines)
    speed = statistics.median(float(line["tokens_per_second"]) for line in lines)
    return {"mfu": statistics.median(mfu), "lowest": mfu[0], "highest": mfu[-1], "tokens_per_second": speed}


def show(result: dict[str, Any]) -> str:
    return (
        f"mfu: sink-pretrain {' '.join(RECIPE[:4])}: {result['mfu']:.1%} ({result['lowest']:.1%} to "
        f"{result['highest']:.1%}), {result['tokens_per_second']:,.0f} tokens/s on {device_name()}"
    )
