"""The loggers of a run: always metrics.csv; wandb and TensorBoard, imported only if the config asks for them."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from recipes.config import dump_config
from recipes.training.logs.metrics_file import MetricsFile
from recipes.training.logs.mirror import Mirror
from recipes.training.logs.names import group_of, tags_of
from recipes.training.logs.wandb_run import WandbRun, check_wandb, switched_off
from recipes.training.settings import CopySettings, PretrainConfig
from sinkmodel.checkpoint import read_metrics
from sinkmodel.console import say
from sinkmodel.errors import UserError, shell
from sinkmodel.secrets import all_redacted


def build_loggers(run: Path, config: PretrainConfig, provenance: dict[str, Any], step: int) -> list[Logger]:
    """The loggers of rank 0, brought level with `step`: that of the checkpoint that training resumes from, or 0.

    Raises UserError if a new run cannot log as its config asks.
    """
    metrics = MetricsFile(run / "metrics.csv")
    metrics.rewind(step)
    mirrors = build_mirrors(run, config, provenance, resuming=step > 0)
    for mirror in mirrors:
        mirror.catch_up(read_metrics(run))
    return [metrics, *mirrors]


def build_mirrors(run: Path, config: PretrainConfig, provenance: dict[str, Any], resuming: bool) -> list[Mirror]:
    """The loggers for wandb and TensorBoard that `config.logging` asks for, before they are brought level.

    Args:
        provenance: the result of `recipes.training.run_folder.provenance_of`, with further facts about the run.
        resuming: whether the run resumes from a checkpoint; see `WandbRun`.
    """
    mirrors: list[Mirror] = []
    if config.logging.tensorboard:
        from recipes.training.logs.tensorboard_files import TensorBoardFiles

        mirrors.append(TensorBoardFiles(run, dump_config(config)))
    if config.logging.wandb and (off := switched_off()):
        say(f"{off} switches wandb off: nothing is logged there; metrics.csv has every line, for a later sink-log")
    elif config.logging.wandb:
        settings = asdict(config)
        shown = all_redacted({**provenance, **settings, "data": {**settings["data"], **provenance["data"]}})
        shown.pop("config", None)
        group = group_of(config, provenance["data"]["fingerprint"])
        mirrors.append(WandbRun(run, config.logging, resuming, config.schedule.steps, shown, group, tags_of(config)))
    return mirrors


def refuse_what_is_not_installed(logging: CopySettings) -> None:
    """Raises UserError if the config asks for a logger whose package is not installed."""
    for package in ("wandb", "tensorboard"):
        wanted = getattr(logging, package) and not (package == "wandb" and switched_off())
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(
                f"logging.{package} is true, but {package} is not installed; pip install 'sinkmodel[{package}]'"
            )


def describe_loggers(config: PretrainConfig) -> str:
    """A text for `--dry-run` that names the run's loggers. Raises UserError if `build_loggers` would."""
    refuse_what_is_not_installed(config.logging)
    loggers = ["metrics.csv"]
    if config.logging.tensorboard:
        loggers.append(shell("tensorboard", "--logdir", config.output))
    if config.logging.wandb and (off := switched_off()):
        loggers.append(f"not wandb, as {off} switches it off")
    elif config.logging.wandb:
        loggers.append(f"wandb ({check_wandb()}), project {config.logging.project}, tags {', '.join(tags_of(config))}")
    return "; ".join(loggers)
