"""How long training waits for a checkpoint of a 160M model, as a ratio to writing it before training continues.

    python -m bench.saving [--rounds 3] [--folder DIR]

Weights and two moments in Pythia-160M's shape in fp32, 1.9 GB. Both sides write the same file, synced, with a checksum.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bench.ratios import of_rounds
from recipes.training.callbacks.checkpoints import BackgroundCheckpointIO
from sinkmodel.checkpoint import write_manifest
from sinkmodel.files import atomic_file, sha256_of
from sinkmodel.models import build_model
from sinkmodel.parser import path_of
from sinkmodel.shapes import ModelShape


def at_once(checkpoint: dict, path: Path) -> float:
    start = time.perf_counter()
    with atomic_file(path) as aside:
        torch.save(checkpoint, aside)
        write_manifest(path.parent, path.name, sha256_of(aside))
    return time.perf_counter() - start


def in_background(checkpoint: dict, path: Path) -> tuple[float, float]:
    """Seconds that training waits, and seconds until the file is complete."""
    writer, start = BackgroundCheckpointIO(), time.perf_counter()
    writer.save_checkpoint(checkpoint, path)
    waited = time.perf_counter() - start
    writer.finish()
    return waited, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=path_of, help="folder to write to (default: the system's temporary folder)")
    options = parser.parse_args()
    state = build_model(ModelShape(), 50_304, seed=0).state_dict()
    moments = {number: {"exp_avg": w.clone(), "exp_avg_sq": w.clone()} for number, w in enumerate(state.values())}
    checkpoint = {"state_dict": state, "optimizer_states": [{"state": moments}]}
    waits, totals, plain = [], [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for _ in range(options.rounds):
            plain.append(at_once(checkpoint, Path(folder) / "step1.ckpt"))
            waited, total = in_background(checkpoint, Path(folder) / "step1.ckpt")
            waits.append(waited)
            totals.append(total)
    print(
        f"saving: training waits {statistics.median(waits):.2f} s, the file is complete after "
        f"{statistics.median(totals):.2f} s; written before training continues {statistics.median(plain):.2f} s; ratio "
        f"{of_rounds(waits, plain)}"
    )


if __name__ == "__main__":
    main()
