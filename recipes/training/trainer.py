"""The Lightning Trainer of a run: its callbacks in their order, its loggers, and the parts that are switched off.

One optimiser step. It reads `accumulation` micro-batches; the lines below are those of a step that has only one. If it
has several, Lightning repeats the lines for each, but calls `optimizer_zero_grad` with the first one only, and
`configure_gradient_clipping` and `AdamW.step` with the last one only.

    on_train_batch_start         module: set the learning rate, which is a function of the step
    training_step                module: forward and loss; nothing waits for the device
    optimizer_zero_grad
    backward                     the loss is divided by `accumulation`; DDP and FSDP2 average over the ranks
    configure_gradient_clipping  module: clip the gradient, and keep its norm (ZeRO does both in its engine)
    AdamW.step                   called before `training_step`, which is in its closure; updates the weights here
    Watchdog                     something has moved: start the time-out again
    StopOnSignal                 agree on signals and failed checkpoints; set `trainer.should_stop`
    StepMeans                    mean losses over micro-batches and ranks, on the device
    Health                       keep loss and gradient norm, on the device, until somebody looks at them
    Metrics                      every `logging.every` steps: wait for the device, look at the health, log a line
    Progress                     show the line that was logged
    Validation                   every `validation.every` steps: score the validation rows, log a line
    Checkpoints                  at steps to save: look at the health, copy the state; a thread writes the file

The names from Watchdog on are callbacks; each line is its `on_train_batch_end`. Watchdog and StepMeans act with every
micro-batch, the others only if it was the last one of its step (`at_step_boundary`). Why this order:

- StopOnSignal comes before Checkpoints, which saves if the run is asked to stop.
- StepMeans comes before Health and Metrics, which read its means. Health comes before Metrics, since a line looks at
  all steps since the last one, and this step is one of them.
- Metrics comes before Progress, which shows its line, and before Validation, which takes its own time out of the speed.
- Checkpoints is last. All that a checkpoint's step has logged is in metrics.csv before the checkpoint exists, so a run
  that is killed in between writes the same lines again, and neither loses nor doubles one.

We use Lightning's loop over micro-batches, its mixed precision, its strategies (FSDP2 and DeepSpeed with methods of
ours for checkpoints), callbacks, the interface of loggers, and the way it collects the state for a checkpoint. We do
not use its validation loop, checkpoint callback, progress bar, `self.log`, learning-rate schedulers,
`gradient_clip_val`, distributed sampler, signal handlers, or LightningCLI.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch import Callback, Trainer

from recipes.training.callbacks.checkpoints import BackgroundCheckpointIO, Checkpoints
from recipes.training.callbacks.health import Health
from recipes.training.callbacks.metrics import Metrics, Progress
from recipes.training.callbacks.preemption import StopOnSignal
from recipes.training.callbacks.steps import StepMeans
from recipes.training.callbacks.validation import Validation
from recipes.training.callbacks.watchdog import Watchdog
from recipes.training.logs.build import build_loggers
from recipes.training.module import SinkLanguageModel
from recipes.training.processes.ranks import World, agree, from_first
from recipes.training.processes.strategies import build_strategy
from recipes.training.settings import PretrainConfig
from recipes.training.setup import Setup
from recipes.training.throughput import flops_per_token, peak_flops
from sinkmodel.checkpoint import Recipe, read_checkpoint
from sinkmodel.products import fast_products


def build_trainer(
    setup: Setup,
    strategy: str,
    world: World,
    module: SinkLanguageModel,
    start: Path | None,
    provenance: dict[str, Any],
) -> tuple[Trainer, StopOnSignal, BackgroundCheckpointIO]:
    """This rank's trainer, the callback that knows whether the run was asked to stop, and the checkpoint writer."""
    config, run = setup.config, setup.run
    on_gpu, half = config.training.device == "cuda", config.training.precision == "bf16"
    _quieten()
    step = 0 if start is None else _step_of(start)
    loggers = agree(lambda: build_loggers(run, config, provenance, step) if world.rank == 0 else [])
    writer = BackgroundCheckpointIO()
    stop = StopOnSignal(writer)
    trainer = Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        strategy=build_strategy(strategy, world, config.training, config.optimizer.clip),
        devices=world.local_size,
        num_nodes=world.nodes,
        precision="bf16-mixed" if half else "32-true",
        max_steps=config.schedule.steps,
        max_epochs=1,  # one endless epoch; recipes.data.order counts the epochs of the data
        accumulate_grad_batches=setup.plan.accumulation,
        callbacks=_callbacks(setup, module, stop, writer),
        logger=loggers,
        plugins=[writer, LightningEnvironment() if strategy == "one" else TorchElasticEnvironment()],
        default_root_dir=run,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,  # Lightning's own logging is not used, but would warn about a short run
        use_distributed_sampler=False,
    )
    _leave_signals_to_us(trainer)
    return trainer, stop, writer


def _callbacks(
    setup: Setup, module: SinkLanguageModel, stop: StopOnSignal, writer: BackgroundCheckpointIO
) -> list[Callback]:
    """In the order of the timeline above: a step is logged before its checkpoint is written."""
    config, run = setup.config, setup.run
    watchdog, means = Watchdog(run, config.training.timeout), StepMeans()
    health = Health(run, means, setup.datamodule.rows_of, config.logging.spike)
    metrics = Metrics(
        means,
        health,
        config.logging.every,
        config.training.batch_tokens,
        flops_per_token(module.model, config.data.sequence),
        from_first(lambda: _peak_flops(config, module.products)),
    )
    return [
        watchdog,
        stop,
        means,
        health,
        metrics,
        Progress(metrics, config.schedule.steps),
        Validation(config.validation.every, metrics, watchdog),
        Checkpoints(run, config, writer, health),
    ]


def _peak_flops(config: PretrainConfig, products: str) -> float:
    """Peak FLOP/s of one device, measured with the run's library of matrix products."""
    half = config.training.precision == "bf16"
    with fast_products(products):
        return peak_flops(torch.device(config.training.device), torch.bfloat16 if half else torch.float32)


def _leave_signals_to_us(trainer: Trainer) -> None:
    """Switch off Lightning 2.6's handling of SIGTERM, which `callbacks.preemption` replaces.

    Lightning broadcasts inside its signal handler, and waits for the device before every micro-batch to share the
    signal with all ranks (Lightning #21487).
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def _quieten() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The loader resumes at a row number, which Lightning cannot know. The number of workers is the user's choice.
    warnings.filterwarnings("ignore", message=".*resuming from a checkpoint that ended before the epoch ended.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated.*")  # Lightning's own use of torch
    warnings.filterwarnings("ignore", message=".*srun. command is available.*")  # one process needs none
    warnings.filterwarnings("ignore", message=".*`torch.distributed.* is deprecated.*")  # DeepSpeed's
    warnings.filterwarnings("ignore", message=".*DeepSpeed handles gradient clipping internally.*")  # on purpose


def _step_of(checkpoint: Path) -> int:
    return Recipe.from_dict(read_checkpoint(checkpoint)["recipe"]).step
