"""Measurements: a generation on training prompts, its mean on validation prompts, and the model before both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from recipes.evolution.fitness import Measured, fitness_of, kept_of
from recipes.evolution.folder import State
from recipes.evolution.host import Host, Read, is_able
from recipes.evolution.population import shared
from recipes.evolution.prompts import Prompts
from recipes.evolution.settings import TASKS, EvolveConfig
from recipes.training.processes.ranks import World, from_first
from sinkmodel.errors import UserError
from sinkmodel.loading import LoadedModel
from sinkmodel.memories.namm import NAMMConfig, measure_statistics
from sinkmodel.progress import CountedProgress
from sinkmodel.tasks.cells import Cell


class Trial:
    """Computes the fitness of a generation's candidates, which all read the same prompts; processes share the work.

    Attributes:
        tasks: results of the latest generation, by task.
        tokens: number of tokens that its candidates have read.
    """

    def __init__(self, config: EvolveConfig, host: Host, prompts: Prompts, world: World):
        self.config, self.host, self.prompts, self.world = config, host, prompts, world
        self.tasks: list[Measured] = []
        self.tokens = 0

    def __call__(self, generation: int, candidates: np.ndarray) -> np.ndarray:
        self.tasks, self.tokens = [], 0
        for task in self.config.tasks.at(generation):
            cell = self.prompts.cell(self.host.loaded, task, "training", self.config.tasks.prompts, generation)
            self.tasks.append(self._measured(cell, candidates))
            self.tokens += len(candidates) * sum(reading.tokens for reading in cell.readings)
        return fitness_of(self.tasks, self.config.fitness.size_penalty)

    def _measured(self, cell: Cell, candidates: np.ndarray) -> Measured:
        full_R = from_first(lambda: scores_of(self.host.of_full_cache(cell)))
        size = self.config.compute.candidates
        numbers = shared(lambda groups: self.host.of_groups(cell, groups), candidates, size, self.world)
        return Measured(cell.task, numbers["score"], numbers["kept"], np.array(full_R))


class Validation:
    """Computes a mean's fitness on the validation prompts of all tasks, and the share of the cache that it keeps."""

    def __init__(self, config: EvolveConfig, host: Host, prompts: Prompts, state: State):
        self.config, self.host, self.full = config, host, state.full
        count = config.validation.prompts
        self.cells = [prompts.cell(host.loaded, TASKS[name], "validation", count) for name in config.tasks.names]

    def __call__(self, mean: np.ndarray) -> tuple[float, float]:
        tasks = []
        for cell in self.cells:
            (numbers,) = self.host.of_groups(cell, [mean[None]])
            tasks.append(Measured(cell.task, numbers["score"], numbers["kept"], np.array(self.full[cell.task])))
        return float(fitness_of(tasks, self.config.fitness.size_penalty)[0]), float(kept_of(tasks)[0])


def begin(config: EvolveConfig, loaded: LoadedModel, prompts: Prompts, namm: NAMMConfig, fingerprint: str) -> State:
    """The state before the first generation: the full cache's scores, and the statistics of the features.

    Raises UserError for a task that the model cannot do with a full cache: its score cannot be used to normalise.
    """
    match = config.fitness.score == "match"
    host, full = Host(loaded, None, match), dict[str, list[float]]()
    with CountedProgress("full cache", "tasks", len(config.tasks.names)) as progress:
        for name in config.tasks.names:
            cell = prompts.cell(loaded, TASKS[name], "validation", config.validation.prompts)
            reads = host.of_full_cache(cell)
            able, value, gain = is_able(reads, [host.nll_alone(reading) for reading in cell.readings], match)
            if not able:
                what = (
                    f"scores {value:.0%}" if match else f"gains {gain:.2f} nats per token of the answer from the prompt"
                )
                raise UserError(
                    f"{loaded.name} cannot do {name} with a full cache: it {what}, so that there is nothing to "
                    "compare with; leave the task out, shorten tasks.length, or use another model"
                )
            full[name] = scores_of(reads)
            progress.add(1)
    contexts = [
        torch.tensor([reading.context], device=loaded.model.device)
        for name in config.tasks.names
        for reading in prompts.cell(loaded, TASKS[name], "statistics", config.tasks.prompts).readings
    ]
    measured = measure_statistics(loaded.model, contexts, namm)
    return State(fingerprint, prompts.files, list(measured.mean), list(measured.variance), full)


def scores_of(reads: Sequence[Read]) -> list[float]:
    """The scores of a single row, by prompt."""
    return [read.score_R.item() for read in reads]
