"""The Lightning Trainer of a run: its callbacks in their order, its loggers, and what of Lightning is switched off."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch import Trainer

from recipes.data.datamodule import BatchPlan, TextDataModule
from recipes.training.callbacks.checkpoints import BackgroundCheckpointIO, Checkpoints
from recipes.training.callbacks.health import Health
from recipes.training.callbacks.metrics import Metrics
from recipes.training.callbacks.preemption import StopOnSignal
from recipes.training.callbacks.progress import Progress
from recipes.training.callbacks.steps import StepMeans
from recipes.training.callbacks.validation import Validation
from recipes.training.callbacks.watchdog import Watchdog
from recipes.training.logs.build import build_loggers
from recipes.training.module import SinkLanguageModel
from recipes.training.processes.ranks import World, agree, from_first
from recipes.training.processes.strategies import build_strategy
from recipes.training.settings import PretrainConfig
from recipes.training.throughput import flops_per_token, peak_flops
from sinkmodel.checkpoint import Recipe, read_checkpoint
from sinkmodel.products import fast_products


def build_trainer(
    run: Path,
    config: PretrainConfig,
    strategy: str,
    world: World,
    plan: BatchPlan,
    module: SinkLanguageModel,
    datamodule: TextDataModule,
    start: Path | None,
    provenance: dict[str, Any],
) -> tuple[Trainer, StopOnSignal, BackgroundCheckpointIO]:
    """The trainer of this rank, the callback that knows whether the run was asked to stop, and who writes its files."""
    on_gpu, half = config.training.device == "cuda", config.training.precision == "bf16"
    _quieten()
    steps = config.schedule.steps
    writer = BackgroundCheckpointIO()
    means, stop = StepMeans(), StopOnSignal(writer)
    watchdog = Watchdog(run, config.training.timeout)
    health = Health(run, means, datamodule.rows_of, config.logging.spike)
    metrics = Metrics(
        means,
        health,
        config.logging.every,
        config.training.batch_tokens,
        flops_per_token(module.model, config.data.sequence),
        from_first(lambda: _peak_flops(config, half, module.products)),
    )
    step = 0 if start is None else _step_of(start)
    loggers = agree(lambda: build_loggers(run, config, provenance, step) if world.rank == 0 else [])
    trainer = Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        strategy=build_strategy(strategy, world, config.training, config.optimizer.clip),
        devices=world.local_size,
        num_nodes=world.nodes,
        precision="bf16-mixed" if half else "32-true",
        max_steps=steps,
        max_epochs=1,  # one endless epoch: the data's own epochs are counted by recipes.data.order
        accumulate_grad_batches=plan.accumulation,
        # In this order: what a step's checkpoint holds has been logged before it is written.
        callbacks=[
            watchdog,
            stop,
            means,
            health,
            metrics,
            Progress(metrics, steps),
            Validation(config.validation.every, metrics, watchdog),
            Checkpoints(run, config, writer, health),
        ],
        logger=loggers,
        plugins=[writer, LightningEnvironment() if strategy == "one" else TorchElasticEnvironment()],
        default_root_dir=run,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,  # of Lightning's own logging, which is not used; a short run would be warned of
        use_distributed_sampler=False,
    )
    _leave_signals_to_us(trainer)
    return trainer, stop, writer


def _peak_flops(config: PretrainConfig, half: bool, products: str) -> float:
    """Of one device, by the products that the run takes."""
    with fast_products(products):
        return peak_flops(torch.device(config.training.device), torch.bfloat16 if half else torch.float32)


def _leave_signals_to_us(trainer: Trainer) -> None:
    """Lightning 2.6 broadcasts inside its SIGTERM handler, and waits for the device before every micro-batch to tell
    the ranks of it (Lightning #21487); `preemption` does neither."""
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def _quieten() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The order is arithmetic, so our loader resumes by number; Lightning cannot know. And the workers are a choice.
    warnings.filterwarnings("ignore", message=".*resuming from a checkpoint that ended before the epoch ended.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated.*")  # Lightning's own use of torch
    warnings.filterwarnings("ignore", message=".*srun. command is available.*")  # one process needs none
    warnings.filterwarnings("ignore", message=".*`torch.distributed.* is deprecated.*")  # DeepSpeed's
    warnings.filterwarnings("ignore", message=".*DeepSpeed handles gradient clipping internally.*")  # as we know


def _step_of(checkpoint: Path) -> int:
    return Recipe.from_dict(read_checkpoint(checkpoint)["recipe"]).step
