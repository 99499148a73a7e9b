"""The run folder (config.yaml, metrics.csv, checkpoints/): which run may resume in it, and from which checkpoint."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from recipes.config import dump_config, flatten, option_of
from recipes.data.datamodule import TextDataModule
from recipes.data.shards import TokenSplit, read_manifest
from recipes.training.processes.ranks import World
from recipes.training.schedule import ScheduleSettings
from recipes.training.settings import DataSettings, PretrainConfig
from sinkmodel.checkpoint import (
    Recipe,
    check_shapes,
    checkpoint_steps,
    digest_of,
    read_checkpoint,
    read_metrics,
    verify,
    weights_of,
    write_manifest,
)
from sinkmodel.console import say
from sinkmodel.errors import UserError, shell
from sinkmodel.files import atomic_file
from sinkmodel.locks import LOCK
from sinkmodel.secrets import all_redacted
from sinkmodel.shapes import ModelShape
from sinkmodel.sinks import SinkConfig

# Keys that a resumed run may change: they decide where and how it runs, not what it computes.
# With another number of processes or another strategy it reads the same rows, and its losses are equal up to rounding.
FREE_TO_CHANGE: tuple[str, ...] = (
    "output",
    "data.path",
    "data.workers",
    "data.verify",
    "training.device",
    "training.threads",
)
FREE_TO_CHANGE += ("training.strategy", "training.devices", "training.micro_rows", "training.timeout")
DEFAULTS = flatten(PretrainConfig(output="-", data=DataSettings(path="-")))  # these two have none
UNDECIDED = {"optimizer.lr": None, "schedule.min_lr": None}  # defaults with `model.start_from`
FREE_GROUPS = ("checkpoints.", "logging.", "schedule.")  # `starting_point` checks a changed schedule


def saved_config(run: Path) -> dict[str, Any] | None:
    """The flattened config of the run in a folder; None if it holds no run yet. UserError if it holds anything else."""
    if not run.exists():
        return None
    saved = run / "config.yaml"
    if saved.is_file():
        return flatten(yaml.safe_load(saved.read_text(encoding="utf-8")))
    if not run.is_dir() or any(path.name != LOCK for path in run.iterdir()):
        raise UserError(f"{run} already holds something else; choose another --output or remove it")
    return None


def check_folder(run: Path, config: PretrainConfig) -> None:
    """Raises UserError if the folder holds another run, or anything else."""
    if (saved := saved_config(run)) is None:
        return
    # A run of an earlier version lacks new keys; it behaved as their defaults do.
    before, now = DEFAULTS | saved, flatten(config)
    names = {before.get("model.start_from"), now.get("model.start_from")}
    moved = len(names) == 2 and None not in names  # possibly: `check_unchanged` compares fingerprints
    # Top-level keys first, because `step` decides others.
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key.count("."), key)):
        if key in FREE_TO_CHANGE or key.startswith(FREE_GROUPS) or now.get(key) == "auto":  # resolved at start
            continue
        if before.get(key) != now.get(key) and not (moved and key == "model.start_from"):
            key = "model.start_from" if moved and key.startswith("model.") else key  # another base has another shape
            raise UserError(
                f"{run} holds a run with {key} = {before.get(key)}, this one has {now.get(key)}; "
                f"resume with {as_options({key: before.get(key)})}, or choose another --output"
            )


def starting_point(run: Path, config: PretrainConfig) -> Path | None:
    """The newest checkpoint that the run can be resumed from; None if there is no checkpoint.

    Damaged checkpoints are skipped and logged. If the schedule has changed, it is the newest checkpoint at which the
    learning rate does not jump: the last one before the decay, if a `wsd` run is made longer.

    Raises UserError if none of the checkpoints can be used: the run would overwrite them.
    """
    newest: tuple[int, ScheduleSettings] | None = None
    for step, path in reversed(checkpoint_steps(run).items()):
        try:
            verify(path)
            before = _schedule_of(read_checkpoint(path))
            if before is None or config.schedule.continues(before, step, config.optimizer.peak):
                return path
        except UserError as error:
            say(f"{error}; trying the previous checkpoint")
            continue
        newest = newest or (step, before)
        if config.schedule.steps <= before.steps:  # only a longer run may resume from an earlier checkpoint
            break
    if newest is not None:
        raise _jump(run, config, *newest)
    if checkpoint_steps(run):
        raise UserError(f"{run} has checkpoints, but none that can be read; restore one or choose another --output")
    return None


def _schedule_of(checkpoint: dict[str, Any]) -> ScheduleSettings | None:
    """The schedule that a checkpoint was trained with; None if it does not record one."""
    config = Recipe.from_dict(checkpoint["recipe"]).provenance.get("config", {})
    return ScheduleSettings(**config["schedule"]) if "schedule" in config else None


def _jump(run: Path, config: PretrainConfig, step: int, before: ScheduleSettings) -> UserError:
    """The error for a run whose newest checkpoint, of `step`, does not fit the config's schedule."""
    now, peak = config.schedule, config.optimizer.peak
    if step > now.steps:
        what = f"{run} has done {step} steps, more than schedule.steps = {now.steps}"
    else:
        rates = f"{before.lr(step - 1, peak):.3g} to {now.lr(step, peak):.3g}"
        what = (
            f"{run} is at step {step} of {before.steps} ({before.kind}); with schedule.steps = {now.steps} "
            f"({now.kind}) the learning rate would jump there from {rates}"
        )
        if now.kind == before.kind == "wsd":
            what += ", and there is no checkpoint from before its decay"
    other = {f"schedule.{key}": value for key, value in asdict(before).items() if value != getattr(now, key)}
    longer = "" if now.kind == "wsd" else "; a run with schedule.kind wsd can be made longer"
    return UserError(
        f"{what}; resume with {as_options(other)}, or choose another --output to train from the start{longer}"
    )


def as_options(values: dict[str, Any]) -> str:
    """The values as `--key value …`, quoted so that a user can copy them to the command line."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return shell(*(word for key, text in texts.items() for word in (option_of(key), text)))


def check_checkpoint(path: Path, model: torch.nn.Module, datamodule: TextDataModule, wanted: SinkConfig) -> None:
    """Raises UserError if the checkpoint has another sink, shape, data or order. Lightning would fail only later."""
    checkpoint = read_checkpoint(path)
    sink = Recipe.from_dict(checkpoint["recipe"]).sink
    if sink != wanted:
        raise UserError(f"{path} was trained with {sink}, this run has {wanted}; use the config of its run")
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    check_shapes(weights_of(checkpoint), trained if frozen else model.state_dict(), path)
    datamodule.load_state_dict(checkpoint["TextDataModule"])


def write_folder(run: Path, config: PretrainConfig, start: Path | None) -> None:
    """Make the folder ready for training from `start`, and record the config in it."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    if start is not None:
        _set_aside(run, config, start)
    for left_over in run.rglob(".*.part"):  # files that a kill left half-written
        left_over.unlink()
    with atomic_file(run / "config.yaml") as aside:
        aside.write_text(dump_config(config), encoding="utf-8")


def _set_aside(run: Path, config: PretrainConfig, start: Path) -> None:
    """If the schedule has changed, move what the run did after `start` to a run folder of its own.

    `RUN/until-step100` gets the checkpoints after `start`, and copies of the config and of all logged numbers. The
    identity of the wandb run moves there too, since wandb accepts no step twice. If this is killed, the old config.yaml
    is still there, so the next start finishes the work.
    """
    before = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    if before["schedule"] == asdict(config.schedule):
        return
    step = Recipe.from_dict(read_checkpoint(start)["recipe"]).step
    later = {at: path for at, path in checkpoint_steps(run).items() if at > step}
    last = max([step, *later, *(int(row["step"]) for row in read_metrics(run))])
    say(f"{run}: the schedule changes at step {step}, and now has {config.schedule.steps} steps")
    if last == step:
        return
    aside = run / f"until-step{last}"
    (aside / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "metrics.csv", "spikes.csv"):
        if (run / name).exists():
            shutil.copy2(run / name, aside / name)
    identity = run / "checkpoints" / "wandb.json"
    if identity.exists():
        os.replace(identity, aside / "checkpoints" / identity.name)
    for path in later.values():
        write_manifest(aside / "checkpoints", path.name, digest_of(path))
        os.replace(path, aside / "checkpoints" / path.name)
    write_manifest(run / "checkpoints")
    say(f"the run's checkpoints and numbers after step {step} are kept in {aside}")


def provenance_of(
    config: PretrainConfig, train: TokenSplit, world: World, start: Path | None, products: str
) -> dict[str, Any]:
    """How the weights were made; with `earlier_schedules` if the steps before `start` followed another schedule."""
    earlier: list[dict[str, Any]] = []
    if start is not None:
        recipe = Recipe.from_dict(read_checkpoint(start)["recipe"])
        earlier = recipe.provenance.get("earlier_schedules", [])
        schedule = recipe.provenance.get("config", {}).get("schedule", asdict(config.schedule))
        if schedule != asdict(config.schedule):
            earlier = [*earlier, {"until_step": recipe.step, **schedule}]
    provenance = {
        **({"earlier_schedules": earlier} if earlier else {}),
        "config": asdict(config),
        "command": _command_of(config),
        "data": {
            "source": read_manifest(Path(config.data.path)).get("source"),  # files, or a data set and its commit
            "fingerprint": train.fingerprint,
            "train_tokens": train.tokens,
        },
        "processes": world.size,
        "nodes": world.nodes,
        "hardware": hardware(config.training.device),
        "products": products,  # the library of products in fp32 on a CPU: see `sinkmodel.products`
        "git_commit": git_commit(),
        "versions": {name: version(name) for name in ("sinkmodel", "torch", "transformers", "lightning")},
    }
    return all_redacted(provenance)


def _command_of(config: PretrainConfig) -> str:
    """A command that repeats this run: all options that decide its numbers, and the path of its data."""
    needed = ("data.path", "training.micro_rows")  # listed although a resumed run may change them
    with_base = config.model.start_from is not None
    decided = {f"model.{field.name}" for field in fields(ModelShape)} if with_base else set()
    defaults = DEFAULTS | (UNDECIDED if with_base else {})
    values = {
        key: value
        for key, value in flatten(config).items()
        if value != defaults[key] and key not in decided and (key in needed or key not in FREE_TO_CHANGE)
    }
    return f"sink-pretrain {as_options(values)}"


def hardware(device: str) -> str:
    """The product name of this process's GPU or CPU. A run that was resumed elsewhere records the last one."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo")
    text = about.read_text(encoding="utf-8", errors="replace") if about.exists() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return name[1].strip() if name else f"CPU, {platform.machine()}"


def git_commit() -> str | None:
    """The commit of the checkout that this runs from, with a `+` if files differ; None outside of a git checkout."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True).stdout.decode().strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed.strip() else "")
