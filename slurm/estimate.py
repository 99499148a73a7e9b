"""Estimates the time of a run on 8 to 1,024 GPUs by a model of compute, gradient traffic and saving; measures nothing.

    python slurm/estimate.py [--inter 40] [--mfu 0.4] …

The run is Pythia-160M's recipe under DDP. A step is forward, backward (overlapped with the gradients' all-reduce), and
optimiser.

    compute      rows / GPUs in micro-batches of at most --micro rows, each at --mfu of the peak, but not faster than
                 --floor ms, the time to launch its kernels: with too few rows a GPU does not get faster
    all-reduce   2 (N - 1) / N · 4 bytes per parameter over the slowest link of the ring, and --hop µs of latency for
                 each of the 2 log2(N) hops of each 25 MB bucket; the backward pass, two thirds of the compute, hides it
                 except for the last bucket
    optimiser    28 bytes per parameter read or written, the same on every GPU (ZeRO-1 would divide it)
    saving       12 bytes per parameter copied to the host, every --every steps; the file is written during training
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from sinkmodel.console import command
from sinkmodel.parser import OneLineParser

PARAMETERS, FLOPS_PER_TOKEN = 162_322_944, 0.969e9  # at rows of 2,048 tokens
ROWS, SEQUENCE, STEPS = 1024, 2048, 143_000
BUCKET = 25e6  # bytes
PEAK = 989e12  # FLOP/s of an H100 in bf16
MEMORY = 2.5e12  # bytes/s of an H100's memory
HOST = 6e9  # bytes/s from a GPU to pageable memory of the host


@dataclass(frozen=True)
class Estimate:
    compute: float  # seconds per step, as all others
    shown: float  # the part of the all-reduce that the backward pass does not hide
    optimiser: float
    saving: float

    @property
    def step(self) -> float:
        return self.compute + self.shown + self.optimiser + self.saving


def estimate(
    gpus: int, intra: float, inter: float, mfu: float, micro: int, floor: float, hop: float, every: int
) -> Estimate:
    """One step on `gpus` GPUs, eight per node; intra and inter in bytes/s, floor and hop in seconds."""
    rows = ROWS / gpus
    batches = math.ceil(rows / micro)
    compute = batches * max(floor, rows / batches * SEQUENCE * FLOPS_PER_TOKEN / (mfu * PEAK))
    size, link = 4 * PARAMETERS, intra if gpus <= 8 else inter
    buckets = math.ceil(size / BUCKET)
    traffic = 2 * (gpus - 1) / gpus * size / link + buckets * 2 * math.log2(gpus) * hop
    shown = max(traffic - compute / batches * 2 / 3, traffic / buckets)  # gradients are sent in the last micro-batch
    return Estimate(compute, shown, 28 * PARAMETERS / MEMORY, 12 * PARAMETERS / HOST / every)


@command("estimate.py")
def main(argv: list[str]) -> None:
    parser = OneLineParser("estimate.py", __doc__ or "", "example: python slurm/estimate.py --inter 40")
    parser.add_argument("--intra", type=float, default=300, help="GB/s of all-reduce within a node (NVLink)")
    parser.add_argument("--inter", type=float, default=200, help="GB/s across nodes (a 400 Gb/s adapter per GPU: 200)")
    parser.add_argument(
        "--mfu", type=float, default=0.40, help="MFU of the forward and backward pass of a full micro-batch"
    )
    parser.add_argument("--micro", type=int, default=32, help="most rows of a micro-batch")
    parser.add_argument("--floor", type=float, default=6, help="least time of a micro-batch, in ms")
    parser.add_argument("--hop", type=float, default=15, help="latency from one GPU to another, in µs")
    parser.add_argument("--every", type=int, default=1000, help="steps between checkpoints")
    options = parser.parse_args(argv)
    print("| GPUs | rows a GPU | compute ms | all-reduce shown ms | optimiser ms | tokens/s | hours | of linear |")
    print("|---|---|---|---|---|---|---|---|")
    first = None
    for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
        parts = estimate(
            gpus,
            options.intra * 1e9,
            options.inter * 1e9,
            options.mfu,
            options.micro,
            options.floor / 1e3,
            options.hop / 1e6,
            options.every,
        )
        speed = ROWS * SEQUENCE / parts.step
        first = first or speed / gpus
        print(
            f"| {gpus} | {ROWS / gpus:g} | {parts.compute * 1e3:.1f} | {parts.shown * 1e3:.1f} | "
            f"{parts.optimiser * 1e3:.1f} | {speed / 1e6:.1f} M | {STEPS * parts.step / 3600:.1f} | "
            f"{speed / gpus / first:.0%} |"
        )


if __name__ == "__main__":
    sys.exit(main())
