"""The loggers of a run: always metrics.csv; wandb and TensorBoard, imported only if the config asks for them.

In wandb, a reader of many runs finds twins by a group that they share and by tags in which they differ.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from recipes.config import dump_config, flatten
from recipes.training.logs.metrics_file import MetricsFile
from recipes.training.logs.mirror import Mirror
from recipes.training.logs.wandb_run import WandbRun, check_wandb, switched_off
from recipes.training.run_folder import FREE_GROUPS, FREE_TO_CHANGE
from recipes.training.settings import CopySettings, PretrainConfig
from sinkmodel.checkpoint import read_metrics
from sinkmodel.console import say
from sinkmodel.errors import UserError, shell
from sinkmodel.secrets import all_redacted
from sinkmodel.sinks import SinkConfig

OF_A_BASE = {  # keys for an existing model, with their values if there is none
    **dict.fromkeys(("step", "model.start_from", "data.skip", "optimizer.start_from")),
    "training.parts": "all",
}
WHERE = 24  # letters of a data folder's name; wandb takes 64 for a tag


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


# ------------------------------------------------------------------------------------------------------- group and tags


def tags_of(config: PretrainConfig) -> list[str]:
    """Sink, model and data, as in `["sink-token", "gpt_neox-12x768", "fineweb-edu"]`."""
    return [_sink(config.sink), _shape(config), _data(config)]


def group_of(config: PretrainConfig, fingerprint: str) -> str:
    """`gpt_neox-12x768-fineweb-edu-1a2b3c4d`; the digits are a hash of all that decides the run except its sink.

    Args:
        fingerprint: that of the data, so that the folder's path does not matter.
    """
    deciding = {
        key: value
        for key, value in flatten(config).items()
        if key not in FREE_TO_CHANGE
        and not key.startswith((*FREE_GROUPS, "sink.", "model.sink_row"))
        and not (key in OF_A_BASE and OF_A_BASE[key] == value)  # so that runs of earlier versions stay in their groups
    }
    digest = hashlib.sha256(json.dumps([fingerprint, deciding], sort_keys=True).encode()).hexdigest()
    return f"{_shape(config)}-{_data(config)}-{digest[:8]}"


def _sink(sink: SinkConfig) -> str:
    return f"sink-{sink.kind}" + (f"-{sink.count}" if sink.tokens > 1 else "")


def _shape(config: PretrainConfig) -> str:
    return f"{config.model.architecture}-{config.model.layers}x{config.model.hidden}"


def _data(config: PretrainConfig) -> str:
    return Path(config.data.path).absolute().name[:WHERE]
