"""Weak scaling of sink-pretrain: tokens/s of two processes as a ratio to twice that of one, with a core per process.

    python -m bench.scaling [--steps 40] [--rounds 3] [--strategies ddp]

The `tiny` model, gloo over the loopback device. Every process has one thread and its own batch of the same size.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.made_up import prepared
from bench.ratios import of_rounds
from recipes.training.settings import STRATEGIES
from sinkmodel.checkpoint import read_metrics

ROWS = 8  # rows of one process in a step


def speed(data: Path, output: Path, strategy: str, processes: int, steps: int) -> float:
    """Median tokens/s of the logged lines, except the first one, which is warm-up."""
    words = ["--config", "tiny", "--config", "sink-token", "--data.path", str(data), "--output", str(output)]
    words += [f"--schedule.steps={steps}", "--validation.every=1000000", "--checkpoints.every=1000000"]
    words += [f"--training.batch_tokens={256 * ROWS * processes}", f"--training.micro_rows={ROWS}"]
    words += ["--training.threads=1", f"--training.strategy={strategy}", "--logging.every=5"]
    words += [f"--training.devices={processes}"] if processes > 1 else []
    command = [sys.executable, "-m", "recipes.pretrain", *words]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return statistics.median([float(row["tokens_per_second"]) for row in read_metrics(output) if row["loss"]][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES[1:], default=["ddp"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = prepared(Path(folder) / "data", train_words=20_000)
        for strategy in options.strategies:
            one, two = [], []
            for i in range(options.rounds):
                one.append(speed(data, Path(folder) / f"{strategy}-one{i}", "auto", 1, options.steps))
                two.append(speed(data, Path(folder) / f"{strategy}-two{i}", strategy, 2, options.steps))
            print(
                f"scaling, {strategy}: {statistics.median(two):,.0f} tokens/s on two processes, "
                f"{statistics.median(one):,.0f} on one; ratio to twice that "
                f"{of_rounds(two, [2 * speed for speed in one])}"
            )


if __name__ == "__main__":
    main()
