"""Everything that `sink-pretrain` can be told, as typed dataclasses; the defaults are Pythia-160M's recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.training.checkpoints import CheckpointSettings
from recipes.training.optimizer import OptimizerSettings
from recipes.training.schedule import ScheduleSettings
from sinkmodel.errors import UserError
from sinkmodel.models import ModelShape
from sinkmodel.sinks import SinkConfig


@dataclass(frozen=True)
class DataSettings:
    """
    Args:
        path: folder that sink-prepare wrote.
        sequence: length of a row in tokens, sinks included.
        shuffle: read the rows in a random order that depends on seed and epoch alone.
        workers: processes that read ahead; 0 reads in the training process.
        verify: `full` compares every shard with its checksum, `sizes` only its length.
    """

    path: str = ""
    sequence: int = 2048
    shuffle: bool = True
    workers: int = 2
    verify: str = "full"

    def __post_init__(self) -> None:
        if self.verify not in ("full", "sizes"):
            raise UserError(f"data.verify is {self.verify!r}; choose full or sizes")
        if self.sequence < 2:
            raise UserError(f"data.sequence is {self.sequence}; it must be at least 2")


@dataclass(frozen=True)
class TrainingSettings:
    """
    Args:
        batch_tokens: tokens of one optimiser step, sinks included, over all processes.
        micro_rows: rows that go through the model at a time in one process; the accumulation follows from it.
        device: `auto`, `cpu` or `cuda`.
        precision: `auto` (bf16 autocast on a GPU, fp32 on a CPU), `bf16` or `fp32`.
        compile: compile the inner model.
        head_chunk: places whose logits exist at a time.
        threads: CPU threads; null leaves it to torch.
    """

    batch_tokens: int = 2_097_152
    micro_rows: int = 32
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False
    head_chunk: int = 1024
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"training.device is {self.device!r}; choose auto, cpu or cuda")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise UserError(f"training.precision is {self.precision!r}; choose auto, bf16 or fp32")
        for name in ("batch_tokens", "micro_rows", "head_chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"training.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class ValidationSettings:
    """
    Args:
        every: steps between measurements.
        rows: how many rows of the validation split are scored, from its start.
    """

    every: int = 1000
    rows: int = 256

    def __post_init__(self) -> None:
        if self.every < 1 or self.rows < 1:
            raise UserError("validation.every and validation.rows must be at least 1")


@dataclass(frozen=True)
class LoggingSettings:
    """
    Args:
        every: steps between logged lines.
        wandb: log to Weights & Biases as well (`WANDB_MODE=offline` works).
        project, name: of the wandb run; the name is the output folder's unless given.
    """

    every: int = 10
    wandb: bool = False
    project: str = "sinkmodel"
    name: str | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"logging.every is {self.every}; it must be at least 1")


@dataclass(frozen=True)
class PretrainConfig:
    """
    Args:
        output: the run folder; a run that stopped there goes on.
        resume: `auto` goes on from the newest checkpoint in `output`; or the path of a checkpoint to start from.
        seed: of the initial weights and of the order of the data.
    """

    output: str = ""
    resume: str = "auto"
    seed: int = 1234
    model: ModelShape = field(default_factory=ModelShape)
    sink: SinkConfig = field(default_factory=SinkConfig)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    checkpoints: CheckpointSettings = field(default_factory=CheckpointSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)

    def __post_init__(self) -> None:
        if not self.output:
            raise UserError("output is missing; say where the run goes, as in --output runs/sink")
        if not self.data.path:
            raise UserError("data.path is missing; give the folder that sink-prepare wrote, as in --data.path data/kjv")
        if self.data.sequence > self.model.positions:
            raise UserError(
                f"data.sequence is {self.data.sequence}, longer than model.positions = {self.model.positions}; "
                "shorten the one or raise the other"
            )
        if self.data.sequence <= self.sink.tokens + 1:
            raise UserError(f"data.sequence is {self.data.sequence}; it leaves no text behind {self.sink.tokens} sinks")
