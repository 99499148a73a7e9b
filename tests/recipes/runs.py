"""Starting and comparing small training runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from recipes.pretrain import main
from sinkmodel.checkpoint import checkpoint_steps, read_metrics
from sinkmodel.files import sha256_of
from sinkmodel.fingerprint import fingerprint_of
from tests import tiny
from tests.processes import Program

# 41,728 parameters; 2 micro-batches a step; 40 steps of 8 rows are 1.1 epochs of what tests.tiny prepares
SETTINGS = {
    "data.sequence": 64,
    "data.workers": 0,
    "model.layers": 2,
    "model.hidden": 32,
    "model.heads": 4,
    "model.kv_heads": 4,
    "model.ffn": 64,
    "model.positions": 64,
    "optimizer.lr": 3e-3,
    "schedule.steps": 40,
    "schedule.warmup": 0.1,
    "schedule.min_lr": 3e-4,
    "training.batch_tokens": 512,
    "training.micro_rows": 4,
    "validation.every": 10,
    "validation.rows": 8,
    "checkpoints.every": 7,
    "logging.every": 5,
    "sink.kind": "token",
}
STEPS = 20
QUICK = {"schedule__steps": STEPS, "checkpoints__every": 3, "training__timeout": 60}  # on several processes
Start = Callable[..., "Program | subprocess.Popen"]
CLOCK = ("tokens_per_second", "mfu")  # what no two runs have in common


def arguments(data: Path, output: Path, **changes: object) -> list[str]:
    """`sink-pretrain`'s options; `sink__kind="none"` changes `sink.kind`."""
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
    words = [f"--{key}={value}" for key, value in settings.items()]
    return [f"--data.path={data}", f"--output={output}", *words]


def train(data: Path, output: Path, **changes: object) -> Path:
    assert main(arguments(data, output, **changes)) == 0
    return output


def start_process(data: Path, output: Path, **changes: object) -> Program:
    """The same in a process of its own, which can be killed."""
    return Program("recipes.pretrain", arguments(data, output, **changes))


def start_as_users_do(data: Path, output: Path, **changes: object) -> subprocess.Popen:
    """The same, slower: it imports all packages, and so does each rank."""
    command = [sys.executable, "-m", "recipes.pretrain", *arguments(data, output, **changes)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def foreign_id(folder: Path, split: str, places: slice = slice(100, 101), train_words: int = 4000) -> Path:
    """A prepared folder, consistent in itself, whose vocabulary lacks the id at some places of a split."""
    tiny.prepared(folder, train_words)
    file = folder / f"{split}-00000.bin"
    ids = np.fromfile(file, "<u2")
    ids[places] = 300
    file.write_bytes(ids.tobytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"][split]["shards"][0]["sha256"] = sha256_of(file)
    manifest["fingerprint"] = fingerprint_of(manifest["tokenizer"]["sha256"], manifest["splits"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def complete(data: Path, run: Path, processes: int = 2, start: Start = start_process, **changes: object) -> str:
    """Run to the end on `processes` of this machine; returns what it wrote to stderr."""
    process = start(data, run, **(QUICK | {"training__devices": processes} | changes))
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    return stderr


def wait_for_checkpoint(process: Program | subprocess.Popen, run: Path, at_least: int) -> None:
    while process.poll() is None and max(checkpoint_steps(run), default=-1) < at_least:
        time.sleep(0.01)
    assert process.poll() is None, f"ended before step {at_least}: {process.stderr.read()}"


def numbers(run: Path) -> list[dict[str, str]]:
    """Every logged number of a run, as text, to the last digit; without those of the clock."""
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in read_metrics(run)]


def final_state(run: Path, step: int = 40) -> dict[str, torch.Tensor]:
    """Weights, and the optimiser's moments, of a checkpoint."""
    content = torch.load(run / "checkpoints" / f"step{step}.ckpt", weights_only=True)
    tensors = dict(content["state_dict"])
    for index, moments in content["optimizer_states"][0]["state"].items():
        tensors |= {f"{index}.{name}": value for name, value in moments.items()}
    return tensors


def assert_same_run(a: Path, b: Path, step: int = 40) -> None:
    """Bit for bit: every logged number, weight and moment."""
    assert numbers(a) == numbers(b)
    state_a, state_b = final_state(a, step), final_state(b, step)
    assert state_a.keys() == state_b.keys()
    assert len(state_a) > 50
    for name, tensor in state_a.items():
        assert torch.equal(tensor, state_b[name]), name
