"""One training run from config to exit code: checks, the run folder, training or resuming."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer

from recipes.data.shards import TokenSplit
from recipes.training.callbacks.preemption import StopOnSignal, requeue
from recipes.training.logs.build import refuse_what_is_not_installed
from recipes.training.module import SinkLanguageModel
from recipes.training.processes import signals
from recipes.training.processes.ranks import (
    World,
    agree,
    find_world,
    from_first,
    join,
    others_may_be_lost,
)
from recipes.training.processes.strategies import resolve_strategy
from recipes.training.run_folder import provenance_of, write_folder
from recipes.training.settings import PretrainConfig
from recipes.training.setup import Setup, set_up
from recipes.training.trainer import build_trainer
from sinkmodel.attention import CAUSAL
from sinkmodel.checkpoint import Recipe, read_checkpoint
from sinkmodel.console import say
from sinkmodel.errors import UserError, shell
from sinkmodel.locks import LOCK, locked
from sinkmodel.models import count_parameters
from sinkmodel.products import AUTO, ONEDNN, SWITCH, TORCH, asked, library, usable


def pretrain(config: PretrainConfig) -> int:
    """Start or resume training. Every process of the run calls this.

    Returns the exit code: 0 when complete, 128 + signal number when a signal stopped it. Raises UserError, on all ranks
    and before anything is written, if config, data and run folder do not fit each other.
    """
    world = find_world()
    config = agree(lambda: _resolve(config, world))
    strategy = agree(lambda: resolve_strategy(config.training, world))
    if strategy != "one":
        join(world, config.training.timeout, config.training.device)
    verify = config.data.verify if world.local_rank == 0 else "sizes"  # one rank of each node compares checksums
    setup = set_up(config, world, verify)
    run, steps = setup.run, setup.config.schedule.steps
    with contextlib.ExitStack() as held:
        from_first(lambda: held.enter_context(locked(run)))
        agree(lambda: _see_folder(run))
        start = setup.starting_point()
        if start == run / "checkpoints" / f"step{steps}.ckpt":
            say(f"{run} is complete: {steps} of {steps} steps; {_export(run)}")
            return 0
        trainer, stop = _train(setup, world, strategy, start)
    if stop.agreed is not None and trainer.global_step < steps:
        say(f"stopped at step {trainer.global_step} of {steps}, saved; resume with the same command, or with:")
        say(f"  {shell('sink-pretrain', '--config', run / 'config.yaml')}")
        if stop.agreed in signals.REQUEUES:
            from_first(requeue)  # the other ranks wait: if one exited, srun would kill rank 0 and its scontrol
        return 128 + stop.agreed
    say(f"trained {steps} steps; {_export(run)}")
    return 0


def _train(setup: Setup, world: World, strategy: str, start: Path | None) -> tuple[Trainer, StopOnSignal]:
    """Train until the last step or a signal. The returned callback has the signal as `agreed`, or None."""
    config, model = setup.config, setup.begin.model
    model.set_attn_implementation(CAUSAL)
    setup.check(start)
    products = from_first(lambda: _products(config, start))
    agree(lambda: _refuse_no_onednn(products))
    provenance = provenance_of(config, setup.train, world, start, products)
    module = _module(setup, products, provenance)
    from_first(lambda: write_folder(setup.run, config, start))
    total, body = count_parameters(model)
    shown = {**provenance, "parameters": total, "parameters_without_embeddings": body}
    trainer, stop, writer = build_trainer(setup, strategy, world, module, start, shown)
    _introduce(setup, strategy, world, start)
    with others_may_be_lost():
        try:
            trainer.fit(module, datamodule=setup.datamodule, ckpt_path=start, weights_only=True)
        except UserError as error:
            if not error.any_rank:  # then all ranks raise it at the same step, and all come here
                from_first(writer.finish)
            raise
        from_first(writer.finish)  # the other ranks wait: if one exited, the launcher would kill rank 0 in its save
    return trainer, stop


def _module(setup: Setup, products: str, provenance: dict[str, Any]) -> SinkLanguageModel:
    config, begin = setup.config, setup.begin
    return SinkLanguageModel(
        begin.model,
        len(begin.front),
        config.optimizer,
        config.schedule,
        recipe=lambda step: Recipe(
            begin.model.config.to_dict(),
            config.sink,
            begin.text,
            step,
            step * config.training.batch_tokens,
            provenance,
            begin.base,
            config.training.parts,
            begin.generation,
        ),
        head_chunk=config.training.head_chunk,
        compile_model=config.training.compile,
        products=products,
        embedding=begin.embedding,
        moments=setup.moments,
    )


def _export(run: Path) -> str:
    return f"export with: {shell('sink-export', '--checkpoint', run, '--output', 'DIR')}"


def _resolve(config: PretrainConfig, world: World) -> PretrainConfig:
    """The config without `auto`. The run folder records it, so that a resumed run keeps device and precision.

    Raises UserError if loggers, processes or GPUs do not fit the config.
    """
    device, precision = config.training.device, config.training.precision
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device is cuda, but torch sees no GPU; choose auto or cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    refuse_what_is_not_installed(config.logging)
    if config.training.devices not in (None, world.local_size):
        raise UserError(
            f"training.devices is {config.training.devices}, but {world.local_size} processes were started on each "
            "node; leave it out, or start as many"
        )
    if device == "cuda" and torch.cuda.device_count() <= world.local_rank:
        raise UserError(
            f"{world.local_size} processes were started on a node where torch sees {torch.cuda.device_count()} GPUs; "
            "start one per GPU"
        )
    return replace(config, training=replace(config.training, device=device, precision=precision))


def _products(config: PretrainConfig, start: Path | None) -> str:
    """The library for matrix products: torch, unless the run is fp32 on a CPU.

    If SINKMODEL_PRODUCTS names a library, it is that one. Otherwise a new run takes the faster one, and a resumed run
    keeps its own, since another changes the losses by rounding. Rank 0 calls this for all ranks.
    """
    if config.training.device != "cpu" or config.training.precision != "fp32":
        return TORCH
    if start is None:
        return library()
    before = read_checkpoint(start)["recipe"]["provenance"].get("products", TORCH)
    wanted = before if asked() == AUTO else asked()
    if wanted == ONEDNN and not usable():
        wanted = TORCH
    if wanted != before:
        say(f"matrix products by {wanted}, before by {before}: losses are equal up to rounding, not to the bit")
    return wanted


def _refuse_no_onednn(products: str) -> None:
    if products == ONEDNN and not usable():
        raise UserError(f"rank 0 uses matrix products of oneDNN, which this rank's torch lacks; set {SWITCH}={TORCH}")


def _see_folder(run: Path, patience: float = 15.0) -> None:
    """Wait until this rank sees the lock in the run folder, since network file systems may show it late.

    Raises UserError after `patience` seconds.
    """
    until = time.monotonic() + patience
    while not (run / LOCK).exists():
        if time.monotonic() > until:
            raise UserError(
                f"rank 0 has made {run}, but this rank does not see it; put --output on a file system that all nodes "
                "share"
            )
        time.sleep(0.2)


def _introduce(setup: Setup, strategy: str, world: World, start: Path | None) -> None:
    run, config, model, plan, train = setup.run, setup.config, setup.begin.model, setup.plan, setup.train
    total, body = count_parameters(model)
    say(f"{run}: {config.model.architecture}, {total:,} parameters ({body:,} without embeddings), sink {config.sink}")
    if config.model.start_from is not None:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        say(f"starting from {config.model.start_from}; {trained:,} parameters are trained ({config.training.parts})")
    tokens = config.schedule.steps * config.training.batch_tokens
    say(
        f"{config.schedule.steps:,} steps × {config.training.batch_tokens:,} tokens ({plan.accumulation} micro-batches "
        f"of {plan.micro_rows} × {config.data.sequence}) = {tokens:,} tokens, {tokens / train.tokens:.2f} × the data"
    )
    if strategy != "one":
        nodes = f" on {world.nodes} nodes" if world.nodes > 1 else ""
        say(f"{world.size} process(es){nodes}, {strategy}")
    entropy, counted = unigram_entropy(train)
    say(
        f"a loss below {entropy:.2f} shows that the model uses context: so many nats is the entropy of single tokens, "
        f"over the first {counted:,} tokens of the data"
    )
    if start is not None:
        before = read_checkpoint(start)["recipe"]["provenance"].get("processes", 1)
        other = f", on {world.size} processes instead of {before}: the same rows, losses equal up to rounding"
        say(f"resuming from {start}{other if before != world.size else ''}")


def unigram_entropy(split: TokenSplit, most: int = 1_000_000) -> tuple[float, int]:
    """Entropy in nats of the frequencies of the first `most` tokens or fewer, and how many were counted."""
    tokens = min(split.tokens, most)
    counts = np.bincount(split.read(0, tokens))
    shares = counts[counts > 0] / tokens
    return float(-(shares * np.log(shares)).sum()), tokens
