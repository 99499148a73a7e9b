"""The run folder: config.yaml, metrics.csv, state.json, and the artefacts `best/` and `last/`.

A resume needs only `state.json`: the fitness of every candidate of every generation, from which the optimiser is
replayed, and the measurements made before the first one. It is written after each generation, whole or not at all.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.config import dump_config, flatten, option_of
from recipes.evolution.settings import EvolveConfig
from recipes.training.run_folder import as_options, saved_config
from sinkmodel.errors import UserError
from sinkmodel.files import atomic_file, read_json
from sinkmodel.memories.namm import NAMMConfig, read_artefact, write_artefact

STATE, FORMAT, VERSION = "state.json", "sinkmodel-evolution", 1
# Keys that a resumed run may change; the model and the texts are compared by their content instead of their names.
FREE_TO_CHANGE: tuple[str, ...] = ("model", "output", "text", "validation_text", "generations", "compute.device")
FREE_TO_CHANGE += ("compute.processes", "compute.threads", "compute.timeout")
BEST, LAST = "best", "last"


@dataclass(frozen=True)
class Validated:
    """Fitness and share kept of the population's mean on the validation prompts, after `generation` generations."""

    generation: int
    fitness: float
    kept: float


@dataclass
class State:
    """The state of a run, from which it is resumed.

    Attributes:
        host: fingerprint of the model's weights.
        files: SHA-256 of the texts by option.
        mean: mean of the memory's features, by bin; with `variance` its frozen statistics.
        variance: variance of the features, by bin.
        full: the full cache's score on each validation prompt, by task.
        fitness: fitness of each candidate of each generation.
        tokens: number of prompt tokens that candidates have read.
        digest: digest of the optimiser's mean after the last generation.
        validated: the results of validation.
    """

    host: str
    files: dict[str, list[str]]
    mean: list[float]
    variance: list[float]
    full: dict[str, list[float]]
    fitness: list[list[float]] = field(default_factory=list)
    tokens: int = 0
    digest: str = ""
    validated: list[Validated] = field(default_factory=list)

    @property
    def best(self) -> Validated | None:
        """The result with the best fitness, the first one if several are equal; None before the first validation."""
        return max(self.validated, key=lambda one: one.fitness, default=None)


def write_state(run: Path, state: State) -> None:
    content = {"format": FORMAT, "version": VERSION, **asdict(state)}
    with atomic_file(run / STATE) as aside:
        aside.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def read_state(run: Path, config: EvolveConfig) -> State | None:
    """The state of a run; None if it has not begun. Raises UserError if the file is damaged."""
    if not (run / STATE).exists():
        return None
    content = read_json(run / STATE)
    damaged = UserError(f"{run / STATE} is damaged; restore it, or choose another --output")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise damaged
    if content.get("version") != VERSION:
        raise UserError(f"{run / STATE} has version {content.get('version')}, and this program reads {VERSION}")
    try:
        state = State(**{each.name: content[each.name] for each in fields(State)})
        state.validated = [Validated(**one) for one in content["validated"]]
        numbers = [value for values in state.fitness for value in values]
        whole = all(len(values) == config.population for values in state.fitness)
        if not whole or not all(math.isfinite(number) for number in (*numbers, *state.mean, *state.variance)):
            raise damaged
    except (KeyError, TypeError):
        raise damaged from None
    return state


def check_folder(run: Path, config: EvolveConfig) -> None:
    """Raises UserError if the folder holds another run, or anything else."""
    if (before := saved_config(run)) is None:
        return
    now = flatten(config)
    if "population" not in before:
        raise UserError(f"{run} holds a run of another command; choose another --output")
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key.count("."), key)):
        if key in FREE_TO_CHANGE or key.startswith("logging."):
            continue
        if before.get(key) != now.get(key):
            raise UserError(
                f"{run} holds a run with {key} = {before.get(key)}, this one has {now.get(key)}; "
                f"resume with {as_options({key: before.get(key)})}, or choose another --output"
            )


def check_same_inputs(run: Path, state: State, host: str, files: dict[str, list[str]], config: EvolveConfig) -> None:
    """Raises UserError if a run would be resumed with another model, other texts, or fewer generations than it has."""
    if state.host != host:
        raise UserError(
            f"{run} holds a run on a model with other weights than {config.model}; give the same model (of a training "
            "run the same checkpoint), or choose another --output"
        )
    for key, digests in files.items():
        if state.files.get(key) != digests:
            raise UserError(
                f"{run} holds a run with other files for {option_of(key)}; give those, or choose another --output"
            )
    if len(state.fitness) > config.generations:
        raise UserError(
            f"{run} has done {len(state.fitness)} generations, more than --generations {config.generations}; "
            "give as many or more"
        )


def write_folder(run: Path, config: EvolveConfig, state: State) -> None:
    """Make the folder ready for the next generation."""
    for left_over in run.glob(".*.part"):  # files that a kill left half-written
        shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
    with atomic_file(run / "config.yaml") as aside:
        aside.write_text(dump_config(config), encoding="utf-8")
    if not (run / STATE).exists():
        write_state(run, state)


def write_result(run: Path, name: str, namm: NAMMConfig, mean: np.ndarray) -> None:
    """Replace the artefact `RUN/name`. If a kill interrupts this, `mend_result` repairs it at the next start."""
    path, old = run / name, run / f".{name}.old.part"
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    write_artefact(path, namm, parameters_of(mean))
    shutil.rmtree(old, ignore_errors=True)


def mend_result(run: Path, name: str, namm: NAMMConfig, mean: np.ndarray) -> None:
    """Write the artefact if it is missing, damaged, or of another generation."""
    try:
        there: Any = read_artefact(run / name)[1] if (run / name).exists() else None
    except UserError:
        there = None
    if there is None or not torch.equal(there, parameters_of(mean)):
        write_result(run, name, namm, mean)


def parameters_of(mean: np.ndarray) -> torch.Tensor:
    return torch.tensor(mean, dtype=torch.float32)
