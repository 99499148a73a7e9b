"""The run folder: config.yaml, metrics.csv, checkpoints/; what may go on in it, and where a run goes on."""

from __future__ import annotations

import platform
import re
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from recipes.config import dump_config, flatten
from recipes.data.datamodule import TextDataModule
from recipes.data.shards import TokenSplit, read_manifest
from recipes.training.processes.ranks import World
from recipes.training.settings import PretrainConfig
from sinkmodel.checkpoint import Recipe, check_shapes, checkpoint_steps, read_checkpoint, verify, weights_of
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.files import atomic_file
from sinkmodel.locks import LOCK
from sinkmodel.secrets import all_redacted
from sinkmodel.sinks import SinkConfig

# Keys that a resumed run may change: they say where and how it runs, not what is computed.
# On other processes or under another strategy it reads the same rows, and its losses are equal to rounding.
FREE_TO_CHANGE: tuple[str, ...] = (
    "output",
    "data.path",
    "data.workers",
    "data.verify",
    "training.device",
    "training.threads",
)
FREE_TO_CHANGE += ("training.strategy", "training.devices", "training.micro_rows", "training.timeout")
FREE_GROUPS = ("checkpoints.", "logging.")


def check_folder(run: Path, config: PretrainConfig) -> None:
    """Raises UserError where the folder holds another run, or something else."""
    if not run.exists():
        return
    saved = run / "config.yaml"
    if not run.is_dir() or (not saved.exists() and any(path.name != LOCK for path in run.iterdir())):
        raise UserError(f"{run} already holds something else; choose another --output or remove it")
    if not saved.exists():
        return
    before, now = flatten(yaml.safe_load(saved.read_text(encoding="utf-8"))), flatten(config)
    for key in sorted(before.keys() | now.keys()):
        if key in FREE_TO_CHANGE or key.startswith(FREE_GROUPS) or now.get(key) == "auto":  # decided where it runs
            continue
        if before.get(key) != now.get(key):
            raise UserError(
                f"{run} holds a run with {key} = {before.get(key)}, this one has {now.get(key)}; "
                f"resume with --{key} {before.get(key)}, or choose another --output"
            )


def starting_point(run: Path) -> Path | None:
    """The newest checkpoint of the run that can be read, None before the first; one that cannot be is said.

    Raises UserError where there are some, and none can be read: starting anew would write over them.
    """
    paths = list(checkpoint_steps(run).values())
    for path in reversed(paths):
        try:
            verify(path)
            read_checkpoint(path)
            return path
        except UserError as error:
            say(f"{error}; going back to the one before")
    if paths:
        raise UserError(f"{run} has checkpoints, but none that can be read; restore one or choose another --output")
    return None


def check_checkpoint(path: Path, model: torch.nn.Module, datamodule: TextDataModule, wanted: SinkConfig) -> None:
    """Raises UserError where the checkpoint has another sink, shape, data or order; Lightning would find out later."""
    checkpoint = read_checkpoint(path)
    sink = Recipe.from_dict(checkpoint["recipe"]).sink
    if sink != wanted:
        raise UserError(f"{path} was trained with {sink}, this run has {wanted}; use the config of its run")
    check_shapes(weights_of(checkpoint), model, path)
    datamodule.load_state_dict(checkpoint["TextDataModule"])


def write_folder(run: Path, config: PretrainConfig) -> None:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    for left_over in run.rglob(".*.part"):  # what a kill left half-written
        left_over.unlink()
    with atomic_file(run / "config.yaml") as aside:
        aside.write_text(dump_config(config), encoding="utf-8")


def provenance_of(config: PretrainConfig, train: TokenSplit, world: World) -> dict[str, Any]:
    provenance = {
        "config": asdict(config),
        "data": {
            "source": read_manifest(Path(config.data.path)).get("source"),  # files, or a data set and its commit
            "fingerprint": train.fingerprint,
            "train_tokens": train.tokens,
        },
        "processes": world.size,
        "nodes": world.nodes,
        "hardware": _hardware(config.training.device),
        "git_commit": _git_commit(),
        "versions": {name: version(name) for name in ("sinkmodel", "torch", "transformers", "lightning")},
    }
    return all_redacted(provenance)


def _hardware(device: str) -> str:
    """What this process computes on, by its maker's name; a run that goes on elsewhere has the last of them."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.+)$", about.read_text(), re.MULTILINE) if about.exists() else None
    return name[1].strip() if name else f"CPU, {platform.machine()}"


def _git_commit() -> str | None:
    """The commit of the checkout that runs, `+` behind it where files differ; None outside of one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed.strip() else "")
