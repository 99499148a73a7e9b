"""The speed of `sink-pretrain` beside a bare loop, the Hugging Face Trainer and litgpt: same model, batch and text.

    python -m bench.peers.training [--litgpt PYTHON] [--steps 10] [--rounds 9] [--compiled]

Each side is a process of one thread, pinned to the same core; they take turns, a block of `--steps` steps each. All of
them train the recipe `tiny` in fp32 as their users would, with their own loop, loss, logging (one line per block) and
reading of tokens. The bare loop is the simplest one in PyTorch (`bench/peers/bare_side.py`): full logits, no schedule,
no log. litgpt compiles its model by default. Here all sides compile with `--compiled`, and none without it. The last
line is the physical limit: what share of the peak of large matrix products each side reaches.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.made_up import prepared
from bench.peers.gate import pin
from bench.peers.turns import Spent, compared, cpu_seconds, peak_product, take_turns, workers
from recipes.config import load_config
from recipes.training.settings import PretrainConfig
from recipes.training.throughput import flops_per_token
from sinkmodel.models import build_model

VOCABULARY = 2176
OURS, BARE, TRAINER, LITGPT = "sink-pretrain", "a bare PyTorch loop", "the Hugging Face Trainer", "litgpt"


def write_job(folder: Path, steps: int, compiled: bool) -> tuple[Path, dict[str, Any], float]:
    """Write prepared text and `job.json`, which all sides read. Returns its path, its content, and FLOP per token."""
    data = prepared(folder / "data", train_words=20_000)
    argv = ["--config", "tiny", "--config", "sink-none", "--data.path", str(data), "--output", str(folder / "run")]
    argv += [f"--model.vocabulary={VOCABULARY}", f"--logging.every={steps}", "--schedule.steps=1000000"]
    argv += [f"--{name}.every=1000000" for name in ("validation", "checkpoints")]
    argv += [f"--training.compile={str(compiled).lower()}", "--training.threads=1"]
    config = load_config(PretrainConfig, argv, "", "sink-pretrain")
    model = build_model(config.model, VOCABULARY, config.seed)
    np.save(folder / "tokens.npy", np.fromfile(data / "train-00000.bin", dtype="<u2").astype(np.int64))
    job = {
        "argv": argv,
        "model": model.config.to_dict(),
        "tokens": str(folder / "tokens.npy"),
        "output": str(folder / "out"),
        "sequence": config.data.sequence,
        "rows": config.training.batch_tokens // config.data.sequence,
        "micro_rows": config.training.micro_rows,
        "lr": config.optimizer.peak,
        "min_lr": config.schedule.min_lr,
        "betas": config.optimizer.betas,
        "eps": config.optimizer.eps,
        "weight_decay": config.optimizer.weight_decay,
        "clip": config.optimizer.clip,
        "block": steps,
        "compiled": compiled,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    return path, job, flops_per_token(model, config.data.sequence)


def report(
    spent: Mapping[str, Sequence[Spent]], tokens: int, flops: float, peak: tuple[float, str], mode: str
) -> list[str]:
    """Our ratio to each other side, and the share of the products' peak that each side reaches.

    Args:
        tokens: tokens of a block.
        flops: floating-point operations of a token, forward and backward.
        peak: FLOP/s, and the library that reached it.
    """
    speed = {name: tokens / cpu_seconds(blocks) for name, blocks in spent.items()}
    lines = [
        f"training, {mode}: {OURS} ({speed[OURS]:,.0f} tokens per second of CPU time) is "
        f"{compared(spent[OURS], blocks)} as {name} ({speed[name]:,.0f})"
        for name, blocks in spent.items()
        if name != OURS
    ]
    shares = ", ".join(f"{name} {flops * each / peak[0]:.0%}" for name, each in speed.items())
    limit = f"{peak[0] / 1e9:,.0f} GFLOP/s by {peak[1]}, {peak[0] / flops:,.0f} tokens/s"
    return [*lines, f"training, {mode}: share of the peak of large products ({limit}): {shares}"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--litgpt", metavar="PYTHON", help="Python of an environment with litgpt (default: without)")
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps of a block")
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each side; five or more have an interval")
    parser.add_argument("--compiled", action="store_true", help="every side compiles its model")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        path, job, flops = write_job(Path(place), options.steps, options.compiled)
        commands: dict[str, list[str | Path]] = {
            OURS: [sys.executable, "-m", "bench.peers.our_side", path],
            BARE: [sys.executable, "-m", "bench.peers.bare_side", path],
            TRAINER: [sys.executable, "-m", "bench.peers.trainer_side", path],
        }
        if options.litgpt:
            commands[LITGPT] = [options.litgpt, "-m", "bench.peers.litgpt_side", path]
        eager = {} if options.compiled else {"TORCH_COMPILE_DISABLE": "1"}
        with workers(commands, **eager) as sides:
            spent = take_turns(sides, options.rounds)
        pin()
        torch.set_num_threads(1)
        peak = peak_product()
    tokens = options.steps * job["rows"] * job["sequence"]
    print(*report(spent, tokens, flops, peak, "compiled" if options.compiled else "eager"), sep="\n", flush=True)


if __name__ == "__main__":
    main()
