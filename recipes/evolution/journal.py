"""Writes the results of each generation: a line of metrics.csv and its copies, the state, the artefacts, progress."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger
from tqdm import tqdm

from recipes.config import dump_config, flatten
from recipes.evolution.fitness import Measured, kept_of
from recipes.evolution.folder import BEST, FREE_TO_CHANGE, LAST, State, Validated, write_result, write_state
from recipes.evolution.optimizer import Evolution
from recipes.evolution.settings import EvolveConfig
from recipes.training.logs.metrics_file import MetricsFile
from recipes.training.logs.mirror import Mirror
from recipes.training.logs.wandb_run import WandbRun, switched_off
from sinkmodel.checkpoint import read_metrics
from sinkmodel.console import say
from sinkmodel.memories.namm import NAMMConfig
from sinkmodel.secrets import all_redacted

COLUMNS = (
    *("step", "tokens", "fitness", "fitness_best", "fitness_deviation", "kept", "sigma", "seconds"),
    *("val_fitness", "val_kept"),
)


def build_loggers(run: Path, config: EvolveConfig, provenance: dict[str, Any], done: int) -> list[Logger]:
    """metrics.csv and the loggers of config.logging, with the lines of the `done` generations that are complete.

    A step is a generation. Raises UserError if a new run cannot log as its config asks.
    """
    metrics = MetricsFile(run / "metrics.csv", columns_of(config))
    metrics.rewind(done)
    mirrors: list[Mirror] = []
    if config.logging.tensorboard:
        from recipes.training.logs.tensorboard_files import TensorBoardFiles

        mirrors.append(TensorBoardFiles(run, dump_config(config)))
    if config.logging.wandb and (off := switched_off()):
        say(f"{off} switches wandb off: nothing is logged there; metrics.csv has every line")
    elif config.logging.wandb:
        shown = all_redacted({**provenance, **asdict(config)})
        tags = ["namm", *config.tasks.names]
        mirrors.append(WandbRun(run, config.logging, done > 0, config.generations, shown, group_of(config), tags))
    for mirror in mirrors:
        mirror.catch_up(read_metrics(run))
    return [metrics, *mirrors]


def columns_of(config: EvolveConfig) -> list[str]:
    return [*COLUMNS, *(f"{kind}_{name}" for name in config.tasks.names for kind in ("fitness", "full"))]


def group_of(config: EvolveConfig) -> str:
    """The wandb group, the same for runs that differ only in their seed."""
    free = (*FREE_TO_CHANGE, "seed")
    deciding = {
        key: value for key, value in flatten(config).items() if key not in free and not key.startswith("logging.")
    }
    digest = hashlib.sha256(json.dumps([config.model, deciding], sort_keys=True).encode()).hexdigest()
    return f"namm-{Path(config.model).name[:24]}-{digest[:8]}"


class Journal:
    """Records each generation in the run folder and the loggers.

    Args:
        state: state of the run; `note` changes and writes it.
        loggers: the result of `build_loggers`.
        validate: returns the fitness of a mean [n] on the validation prompts, and the share of the cache that it keeps.
        namm: the memory's config with its provenance; the artefacts get it with fitness and generation added.
    """

    def __init__(
        self,
        run: Path,
        config: EvolveConfig,
        state: State,
        evolution: Evolution,
        loggers: Sequence[Logger],
        validate: Callable[[np.ndarray], tuple[float, float]],
        namm: NAMMConfig,
    ):
        self.run, self.config, self.state, self.evolution = run, config, state, evolution
        self.loggers, self.validate, self.namm = loggers, validate, namm
        self.first, self.began = len(state.fitness), time.monotonic()
        self.clock = self.began
        self.bar: tqdm | None = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=config.generations, initial=self.first, unit="generation", dynamic_ncols=True)

    def note(self, done: int, values: np.ndarray, tasks: Sequence[Measured], tokens: int) -> None:
        """Record a complete generation. The state is written last, so that work lost by a kill is done again.

        Args:
            done: number of complete generations, this one included.
            values: fitness of each candidate.
            tasks: the generation's results, by task.
            tokens: number of tokens that its candidates have read.
        """
        state = self.state
        state.fitness.append(values.tolist())
        state.tokens += tokens
        state.digest = self.evolution.digest
        line = self._line(values, tasks)
        if done % self.config.validation.every == 0 or done == self.config.generations:
            line |= self._validated(done)
        now = time.monotonic()
        line["seconds"], self.clock = now - self.clock, now
        for logger in self.loggers:
            logger.log_metrics(line, done)
        write_state(self.run, state)
        self._show(done, line)

    def close(self, status: str) -> None:
        for logger in self.loggers:
            logger.finalize(status)
        if self.bar is not None:
            self.bar.close()

    def _line(self, values: np.ndarray, tasks: Sequence[Measured]) -> dict[str, float]:
        line = {
            "tokens": float(self.state.tokens),
            "fitness": float(values.mean()),
            "fitness_best": float(values.max()),
            "fitness_deviation": float(values.std()),
            "kept": float(kept_of(tasks).mean()),
            "sigma": self.evolution.sigma,
        }
        for task in tasks:
            line[f"full_{task.task}"] = float(task.full_R.mean())
            if (ratio_P := task.ratio_P) is not None:
                line[f"fitness_{task.task}"] = float(ratio_P.mean())
        return line

    def _validated(self, done: int) -> dict[str, float]:
        mean = self.evolution.mean
        fitness, kept = self.validate(mean)
        before = self.state.best
        self.state.validated.append(Validated(done, fitness, kept))
        about = described(self.namm, self.state.validated[-1])
        write_result(self.run, LAST, about, mean)
        if before is None or fitness > before.fitness:
            write_result(self.run, BEST, about, mean)
        return {"val_fitness": fitness, "val_kept": kept}

    def _show(self, done: int, line: dict[str, float]) -> None:
        shown = f"fitness {line['fitness']:.4f} (best {line['fitness_best']:.4f})  kept {line['kept']:.0%}"
        if "val_fitness" in line:
            shown += f"  validation {line['val_fitness']:.4f}, kept {line['val_kept']:.0%}"
        if self.bar is not None:
            self.bar.set_postfix_str(shown)
            self.bar.update()
            return
        left = (time.monotonic() - self.began) / (done - self.first) * (self.config.generations - done)
        say(f"generation {done}/{self.config.generations}  {shown}  {line['seconds']:.1f} s  {left / 60:.0f} min left")


def described(namm: NAMMConfig, validated: Validated) -> NAMMConfig:
    """The config of a mean's artefact: `namm` with the results of its validation."""
    evolved_on = {**namm.evolved_on, "generation": validated.generation, "kept": validated.kept}
    return namm.replace(evolved_on=evolved_on, fitness=validated.fitness)
