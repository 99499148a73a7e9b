"""Reading a prompt of 131,072 tokens with each KV memory, in the shape of Llama-3.1-8B: `sink-eval latency --prefill`.

Each memory is measured beside dense in a call of its own, so that one that runs out of memory or time costs no other.
The NAMM has random parameters, which decide what it keeps, and not what it costs to decide.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.gpu.machine import DEVICE, DTYPE, device_name, free, shape_file, sized
from eval.cli import main as sink_eval
from eval.commands.prefill import NAMES
from eval.measures.shape import config_of, read_shape
from sinkmodel.files import read_json
from sinkmodel.memories import NAMM
from sinkmodel.memories.namm import NAMMConfig

SHAPE = shape_file("llama-8b")
LENGTH, BUDGET = sized(131_072, 96), sized(1024, 40)
ANSWERS = sized([1, 128], [1, 2])
ROUNDS = sized(5, 1)  # five give an interval
MEMORIES = [name for name in NAMES if name != "dense"]
WINDOW, HOP, INTERVAL = sized((32, 16, 512), (8, 4, 16))  # the paper's, and smaller
BINS = WINDOW // 2 + 1
STATISTICS = {"mean": (0.01,) * BINS, "variance": (1e-4,) * BINS}
NAMM_CONFIG = NAMMConfig(window=WINDOW, hop=HOP, interval=INTERVAL, **STATISTICS)


def measure(memory: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        argv = ["latency", "--prefill", "--shape", str(SHAPE), "--dtype", DTYPE, "--device", DEVICE]
        argv += ["--length", str(LENGTH), "--budgets", str(BUDGET), "--rounds", str(ROUNDS), "--memories", memory]
        argv += ["--answers", *map(str, ANSWERS), "--json", str(result)]
        if memory == "namm":
            argv += ["--artefact", str(random_namm(Path(folder) / "namm"))]
        if code := sink_eval(argv):
            raise RuntimeError(f"sink-eval latency ended with exit code {code}; the lines above name the cause")
        free()
        return read_json(result)


def random_namm(folder: Path) -> Path:
    parameters = torch.randn(NAMM_CONFIG.parameters, generator=torch.Generator().manual_seed(0))
    NAMM(config_of(read_shape(SHAPE)), NAMM_CONFIG, parameters).save_pretrained(folder)
    return folder


def show(result: dict[str, Any]) -> str:
    dense, *rows = result["rows"]
    device = device_name()
    lines = [
        f"prefill, {SHAPE.stem} in {DTYPE}, {LENGTH:,} tokens: {row['label']} takes {row['ttft_ratio']:.2f}× dense "
        f"({row['ttft_ms'] / 1e3:.2f} against {dense['ttft_ms'] / 1e3:.2f} s), "
        f"a step {row['answers'][-1]['step_ratio']:.2f}×, and holds {row['bytes_held'] / 2**20:,.0f} MiB on {device}"
        for row in rows
    ]
    return "\n".join(lines)
