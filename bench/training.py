"""sink-pretrain's tokens/s as a ratio to a bare PyTorch loop with the same model, batch, loss and optimiser.

    python -m bench.training [--steps 40] [--rounds 3]

Both sides alternate in one process on the same cores, so that other load on the machine affects both.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.made_up import prepared
from recipes.config import load_config
from recipes.pretrain import main as sink_pretrain
from recipes.training.optimizer import build_optimizer
from recipes.training.settings import PretrainConfig
from sinkmodel.checkpoint import read_metrics
from sinkmodel.models import build_model


def bare_loop(config: PretrainConfig, vocabulary: int, steps: int) -> float:
    """Tokens/s of the simplest loop: full logits, F.cross_entropy, clipping, AdamW. No data loading, no logging."""
    model = build_model(config.model, vocabulary, config.seed)
    optimizer = build_optimizer(model, config.optimizer)
    rows = config.training.batch_tokens // config.data.sequence
    micro = config.training.micro_rows
    batch = torch.randint(0, vocabulary, (rows, config.data.sequence + 1))

    def step() -> None:
        for part in batch.split(micro):
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
            (F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()) * micro / rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()

    step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return steps * config.training.batch_tokens / (time.perf_counter() - start)


def pretrain(argv: list[str], output: Path) -> float:
    """Median tokens/s of the lines that sink-pretrain logged, except the first one, which is warm-up."""
    with contextlib.redirect_stderr(io.StringIO()):
        assert sink_pretrain([*argv, "--output", str(output)]) == 0
    speeds = [float(row["tokens_per_second"]) for row in read_metrics(output) if row["loss"]]
    return statistics.median(speeds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = prepared(Path(folder) / "data", train_words=20_000)
        argv = ["--config", "tiny", "--config", "sink-token", "--data.path", str(data)]
        argv += [f"--schedule.steps={options.steps}", "--validation.every=1000000", "--checkpoints.every=1000000"]
        argv += ["--model.vocabulary=2176"]
        config = load_config(PretrainConfig, [*argv, "--output", "unused"], "", "sink-pretrain")
        ours, bare = [], []
        for i in range(options.rounds):
            bare.append(bare_loop(config, 2176, options.steps))
            ours.append(pretrain(argv, Path(folder) / f"run{i}"))
    ratios = sorted(a / b for a, b in zip(ours, bare))
    print(
        f"training: sink-pretrain {statistics.median(ours):,.0f} tokens/s, bare PyTorch loop "
        f"{statistics.median(bare):,.0f}; ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    main()
