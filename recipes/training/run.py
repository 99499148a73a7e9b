"""One training run: its folder, what goes into it, and going on where it stopped."""

from __future__ import annotations

import logging
import subprocess
import uuid
import warnings
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, WandbLogger

from recipes.config import dump_config, flatten
from recipes.data.datamodule import BatchPlan, TextDataModule, plan_batches
from recipes.data.shards import TokenSplit, open_split, read_manifest
from recipes.training.checkpoints import AtomicCheckpointIO, Checkpoints
from recipes.training.interrupt import StopOnSignal
from recipes.training.logs import MetricsFile
from recipes.training.metrics import Metrics
from recipes.training.module import SinkLanguageModel
from recipes.training.progress import Progress
from recipes.training.settings import PretrainConfig
from recipes.training.throughput import flops_per_token, peak_flops
from recipes.training.validation import Validation
from sinkmodel.checkpoint import Recipe, check_shapes, checkpoint_steps, find_checkpoint, read_checkpoint, weights_of
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.files import atomic_file, write_json
from sinkmodel.models import build_model, count_parameters
from sinkmodel.sinks import padded_vocabulary, write_sink
from sinkmodel.tokenizer import TextTokenizer

# Keys that a resumed run may change: they say where and how it runs, not what is computed.
FREE_TO_CHANGE = ("output", "resume", "data.path", "data.workers", "data.verify", "training.device", "training.threads")
FREE_GROUPS = ("checkpoints.", "logging.")


def pretrain(config: PretrainConfig) -> int:
    """Train, or go on training. Returns the exit code: 0 when complete, 128 + signal when stopped by one.

    Raises UserError for a config, data or run folder that do not fit each other, before anything is written.
    """
    run = Path(config.output)
    train, validation = _open_data(config)
    text = TextTokenizer.from_file(train.tokenizer_file, train.eos_id, train.pad_id)
    rows = _vocabulary_rows(config, text.vocabulary)
    plan = plan_batches(config.training.batch_tokens, config.data.sequence, config.training.micro_rows, ranks=1)
    _check_folder(run, config)
    start = _starting_point(run, config)
    steps = config.schedule.steps
    if start is not None and start.name == f"step{steps}.ckpt" and start.parent.parent == run:
        say(f"{run} is complete: {steps} of {steps} steps; export it with: sink-export --checkpoint {run} --output DIR")
        return 0

    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    model = build_model(config.model, rows, config.seed)
    sink_ids = config.sink.ids(text.vocabulary)
    write_sink(model.config, config.sink, sink_ids)
    datamodule = TextDataModule(
        train,
        validation,
        sink_ids,
        sequence=config.data.sequence,
        plan=plan,
        steps=steps,
        seed=config.seed,
        shuffle=config.data.shuffle,
        validation_rows=config.validation.rows,
        workers=config.data.workers,
    )
    if start is not None:
        _check_checkpoint(start, model, datamodule, config)
    provenance = _provenance(config, train)
    module = SinkLanguageModel(
        model,
        config.sink.tokens,
        config.optimizer,
        config.schedule,
        recipe=lambda step: Recipe(
            model.config.to_dict(), config.sink, text, step, step * config.training.batch_tokens, provenance
        ),
        head_chunk=config.training.head_chunk,
        compile_model=config.training.compile,
    )
    _write_folder(run, config)
    trainer, stop = _build_trainer(run, config, plan, module, start)
    _introduce(run, config, model, train, plan, start)
    trainer.fit(module, datamodule=datamodule, ckpt_path=start, weights_only=True)
    if stop.received is not None and trainer.global_step < steps:
        say(f"stopped at step {trainer.global_step} of {steps}, saved; go on with the same command, or with:")
        say(f"  sink-pretrain --config {run / 'config.yaml'}")
        return 128 + stop.received
    say(f"trained {steps} steps; export with: sink-export --checkpoint {run} --output DIR")
    return 0


def _open_data(config: PretrainConfig) -> tuple[TokenSplit, TokenSplit | None]:
    folder = Path(config.data.path)
    train = open_split(folder, "train", config.data.verify)
    if read_manifest(folder)["splits"].get("validation", {}).get("tokens"):
        return train, open_split(folder, "validation", config.data.verify)
    say(f"{folder} has no validation split: no validation loss is measured")
    return train, None


def _vocabulary_rows(config: PretrainConfig, vocabulary: int) -> int:
    rows = config.model.vocabulary or padded_vocabulary(vocabulary)
    if vocabulary + config.sink.tokens > rows:
        raise UserError(
            f"the tokenizer of {config.data.path} does not fit the model: it has {vocabulary} ids and "
            f"{config.sink.tokens} sinks come on top, but model.vocabulary is {rows}; set it to "
            f"{padded_vocabulary(vocabulary)}, or to null to have it chosen"
        )
    return rows


def _check_folder(run: Path, config: PretrainConfig) -> None:
    """Raises UserError where the folder holds another run, or something else."""
    if not run.exists():
        return
    saved = run / "config.yaml"
    if not run.is_dir() or (not saved.exists() and any(run.iterdir())):
        raise UserError(f"{run} already holds something else; choose another --output or remove it")
    if not saved.exists():
        return
    before, now = flatten(yaml.safe_load(saved.read_text(encoding="utf-8"))), flatten(config)
    for key in sorted(before.keys() | now.keys()):
        if key in FREE_TO_CHANGE or key.startswith(FREE_GROUPS):
            continue
        if before.get(key) != now.get(key):
            raise UserError(
                f"{run} holds a run with {key} = {before.get(key)}, this one has {now.get(key)}; "
                f"resume with --{key} {before.get(key)}, or choose another --output"
            )


def _starting_point(run: Path, config: PretrainConfig) -> Path | None:
    """The run's own newest checkpoint; else the one that `resume` names; else None."""
    own = checkpoint_steps(run)
    if own:
        return own[max(own)]
    return None if config.resume == "auto" else find_checkpoint(Path(config.resume))


def _check_checkpoint(
    path: Path, model: torch.nn.Module, datamodule: TextDataModule, config: PretrainConfig
) -> None:
    """Raises UserError where the checkpoint has another sink, shape, data or order; Lightning would find out later."""
    checkpoint = read_checkpoint(path)
    sink = Recipe.from_dict(checkpoint["recipe"]).sink
    if sink != config.sink:
        raise UserError(f"{path} was trained with {sink}, this run has {config.sink}; use the config of its run")
    check_shapes(weights_of(checkpoint), model, path)
    datamodule.load_state_dict(checkpoint["TextDataModule"])


def _write_folder(run: Path, config: PretrainConfig) -> None:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    for left_over in run.rglob(".*.part"):  # what a kill left half-written
        left_over.unlink()
    with atomic_file(run / "config.yaml") as aside:
        aside.write_text(dump_config(config), encoding="utf-8")


def _build_trainer(
    run: Path, config: PretrainConfig, plan: BatchPlan, module: SinkLanguageModel, start: Path | None
) -> tuple[Trainer, StopOnSignal]:
    device = config.training.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device is cuda, but torch sees no GPU; choose auto or cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = config.training.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # The order is arithmetic, so our loader resumes by number; Lightning cannot know. And the workers are a choice.
    warnings.filterwarnings("ignore", message=".*resuming from a checkpoint that ended before the epoch ended.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated.*")  # Lightning's own use of torch

    metrics = Metrics(
        run,
        config.logging.every,
        config.training.batch_tokens,
        flops_per_token(module.model, config.data.sequence),
        peak_flops(torch.device(device)),
    )
    stop = StopOnSignal()
    steps = config.schedule.steps
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_steps=steps,
        max_epochs=1,  # one endless epoch: the data's own epochs are counted by recipes.data.order
        accumulate_grad_batches=plan.accumulation,
        # In this order: what a step's checkpoint holds has been logged before it is written.
        callbacks=[
            stop,
            metrics,
            Validation(config.validation.every, metrics),
            Progress(metrics, steps),
            Checkpoints(run, config.checkpoints, steps),
        ],
        logger=_build_loggers(run, config, 0 if start is None else _step_of(start)),
        plugins=[AtomicCheckpointIO()],
        default_root_dir=run,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,  # of Lightning's own logging, which is not used; a short run would be warned of
        use_distributed_sampler=False,
    )
    return trainer, stop


def _step_of(checkpoint: Path) -> int:
    return Recipe.from_dict(read_checkpoint(checkpoint)["recipe"]).step


def _build_loggers(run: Path, config: PretrainConfig, step: int) -> list[Logger]:
    metrics = MetricsFile(run / "metrics.csv")
    metrics.rewind(step)
    loggers: list[Logger] = [metrics]
    if config.logging.wandb:
        identity = run / "checkpoints" / "wandb.json"  # one wandb run, however often it is resumed
        if not identity.exists():
            write_json(identity, {"id": uuid.uuid4().hex[:8]})
        loggers.append(
            WandbLogger(
                project=config.logging.project,
                name=config.logging.name or run.name,
                id=yaml.safe_load(identity.read_text(encoding="utf-8"))["id"],
                resume="allow",
                save_dir=run,
                config=flatten(config),
            )
        )
    return loggers


def _provenance(config: PretrainConfig, train: TokenSplit) -> dict[str, Any]:
    return {
        "config": asdict(config),
        "data": {"fingerprint": train.fingerprint, "train_tokens": train.tokens},
        "git_commit": _git_commit(),
        "versions": {name: version(name) for name in ("sinkmodel", "torch", "transformers", "lightning")},
    }


def _git_commit() -> str | None:
    """The commit of the checkout that runs, `+` behind it where files differ; None outside of one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed.strip() else "")


def _introduce(
    run: Path, config: PretrainConfig, model: Any, train: TokenSplit, plan: BatchPlan, start: Path | None
) -> None:
    total, body = count_parameters(model)
    say(f"{run}: {config.model.architecture}, {total:,} parameters ({body:,} without embeddings), sink {config.sink}")
    tokens = config.schedule.steps * config.training.batch_tokens
    say(
        f"{config.schedule.steps:,} steps × {config.training.batch_tokens:,} tokens ({plan.accumulation} micro-batches "
        f"of {plan.micro_rows} × {config.data.sequence}) = {tokens:,} tokens, {tokens / train.tokens:.2f} × the data"
    )
    if start is not None:
        say(f"going on from {start}")
