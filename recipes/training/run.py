"""One training run: its folder, what goes into it, and going on where it stopped."""

from __future__ import annotations

import importlib.util
import logging
import uuid
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, WandbLogger

from recipes.config import flatten
from recipes.data.datamodule import BatchPlan, TextDataModule, plan_batches
from recipes.data.shards import TokenSplit, open_split, read_manifest
from recipes.training.checkpoints import AtomicCheckpointIO, Checkpoints
from recipes.training.folder import check_checkpoint, check_folder, provenance_of, starting_point, write_folder
from recipes.training.interrupt import StopOnSignal, StoppedAtOnce
from recipes.training.logs import MetricsFile
from recipes.training.metrics import Metrics
from recipes.training.module import SinkLanguageModel
from recipes.training.progress import Progress
from recipes.training.settings import PretrainConfig
from recipes.training.throughput import flops_per_token, peak_flops
from recipes.training.validation import Validation
from sinkmodel.attention import CAUSAL
from sinkmodel.checkpoint import Recipe, read_checkpoint
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.files import locked, write_json
from sinkmodel.models import build_model, count_parameters
from sinkmodel.sinks import padded_vocabulary, write_sink
from sinkmodel.tokenizer import TextTokenizer


def pretrain(config: PretrainConfig) -> int:
    """Train, or go on training. Returns the exit code: 0 when complete, 128 + signal when stopped by one.

    Raises UserError for a config, data or run folder that do not fit each other, before anything is written.
    """
    run, steps = Path(config.output), config.schedule.steps
    config = _resolve(config)
    train, validation = _open_data(config)
    text = TextTokenizer.from_file(train.tokenizer_file, train.eos_id, train.pad_id)
    rows = _vocabulary_rows(config, text.vocabulary)
    plan = plan_batches(config.training.batch_tokens, config.data.sequence, config.training.micro_rows, ranks=1)
    check_folder(run, config)
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    sink_ids = config.sink.ids(text.vocabulary)
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
    with locked(run):
        start = starting_point(run)
        if start == run / "checkpoints" / f"step{steps}.ckpt":
            say(f"{run} is complete: {steps} of {steps} steps; {_export(run)}")
            return 0
        model = build_model(config.model, rows, config.seed)
        write_sink(model.config, config.sink, sink_ids)
        model.set_attn_implementation(CAUSAL)
        if start is not None:
            check_checkpoint(start, model, datamodule, config.sink)
        provenance = provenance_of(config, train)
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
        write_folder(run, config)
        trainer, stop = _build_trainer(run, config, plan, module, start)
        _introduce(run, config, model, train, plan, start)
        try:
            trainer.fit(module, datamodule=datamodule, ckpt_path=start, weights_only=True)
        except StoppedAtOnce:
            raise KeyboardInterrupt from None
    if stop.received is not None and trainer.global_step < steps:
        say(f"stopped at step {trainer.global_step} of {steps}, saved; go on with the same command, or with:")
        say(f"  sink-pretrain --config {run / 'config.yaml'}")
        return 128 + stop.received
    say(f"trained {steps} steps; {_export(run)}")
    return 0


def _export(run: Path) -> str:
    return f"export with: sink-export --checkpoint {run} --output DIR"


def _resolve(config: PretrainConfig) -> PretrainConfig:
    """The config with device and precision decided; what the run folder keeps, so that a resume computes the same."""
    device, precision = config.training.device, config.training.precision
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device is cuda, but torch sees no GPU; choose auto or cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    if config.logging.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("logging.wandb is true, but wandb is not installed; pip install 'sinkmodel[wandb]'")
    return replace(config, training=replace(config.training, device=device, precision=precision))


def _open_data(config: PretrainConfig) -> tuple[TokenSplit, TokenSplit | None]:
    folder = Path(config.data.path)
    train = open_split(folder, "train", config.data.verify)
    if read_manifest(folder)["splits"].get("validation", {}).get("tokens"):
        return train, open_split(folder, "validation", config.data.verify)
    say(f"{folder} has no validation split: no validation loss is measured")
    return train, None


def _vocabulary_rows(config: PretrainConfig, vocabulary: int) -> int:
    rows = padded_vocabulary(vocabulary) if config.model.vocabulary is None else config.model.vocabulary
    if vocabulary + config.sink.tokens > rows:
        raise UserError(
            f"the tokenizer of {config.data.path} does not fit the model: it has {vocabulary} ids and "
            f"{config.sink.tokens} sinks come on top, but model.vocabulary is {rows}; set it to "
            f"{padded_vocabulary(vocabulary)}, or to null to have it chosen"
        )
    return rows


def _build_trainer(
    run: Path, config: PretrainConfig, plan: BatchPlan, module: SinkLanguageModel, start: Path | None
) -> tuple[Trainer, StopOnSignal]:
    on_gpu, half = config.training.device == "cuda", config.training.precision == "bf16"
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
        peak_flops(torch.device(config.training.device), torch.bfloat16 if half else torch.float32),
    )
    stop = StopOnSignal()
    steps = config.schedule.steps
    trainer = Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        precision="bf16-mixed" if half else "32-true",
        max_steps=steps,
        max_epochs=1,  # one endless epoch: the data's own epochs are counted by recipes.data.order
        accumulate_grad_batches=plan.accumulation,
        # In this order: what a step's checkpoint holds has been logged before it is written.
        callbacks=[
            stop,
            metrics,
            Progress(metrics, steps),
            Validation(config.validation.every, metrics),
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
    entropy, counted = unigram_entropy(train)
    say(
        f"a loss below {entropy:.2f} has learned from context: that is the entropy of single tokens, of the first "
        f"{counted:,} in the data"
    )
    if start is not None:
        say(f"going on from {start}")


def unigram_entropy(split: TokenSplit, most: int = 1_000_000) -> tuple[float, int]:
    """Entropy in nats of the frequencies of single tokens, over at most `most` tokens from the start; and how many."""
    tokens = min(split.tokens, most)
    counts = np.bincount(split.read(0, tokens))
    shares = counts[counts > 0] / tokens
    return float(-(shares * np.log(shares)).sum()), tokens
