"""`sink-pretrain --dry-run`: checks a run before its job is queued, on a machine that need not have its GPUs."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from recipes.training.logs.build import describe_loggers
from recipes.training.loss import LossHead
from recipes.training.processes.ranks import World
from recipes.training.processes.strategies import resolve_strategy
from recipes.training.settings import Precision, PretrainConfig
from recipes.training.setup import set_up
from recipes.training.throughput import PEAKS, flops_per_token
from sinkmodel.attention import CAUSAL
from sinkmodel.checkpoint import checkpoint_steps
from sinkmodel.console import put
from sinkmodel.errors import UserError
from sinkmodel.models import count_parameters, head_of
from sinkmodel.products import fast_products

ASSUMED_GPU, ASSUMED_MFU = "H100", 0.40  # well-tuned trainers of this size reach it (llm.c, modded-nanogpt, nanochat)
BYTES_PER_PARAMETER = 12  # in a checkpoint: weight and two moments in fp32


def dry_run(config: PretrainConfig, processes: int) -> int:
    """Check everything and print what the run will need, without training or writing. Returns the exit code, 0.

    Raises UserError for whatever would stop the run: data, tokenizer, strategy, batch arithmetic on `processes`, run
    folder, checkpoint to resume from, disk space. A missing GPU is not an error here.
    """
    data = Path(config.data.path)
    resolve_strategy(replace(config.training, precision=_precision(config)), World(size=processes))
    on_a_node = min(processes, config.training.devices or 1)  # not known if training.devices is left out
    world = World(size=processes, local_size=on_a_node)
    setup = set_up(config, world, config.data.verify)
    config, run, model, train, plan = setup.config, setup.run, setup.begin.model, setup.train, setup.plan
    logging = describe_loggers(config)
    start = setup.starting_point() if run.exists() else None
    setup.check(start)
    layout = setup.datamodule.samples.layout
    total, body = count_parameters(model)
    steps, tokens = config.schedule.steps, config.schedule.steps * config.training.batch_tokens
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) * BYTES_PER_PARAMETER
    files = _at_a_time(config)
    kept = list(checkpoint_steps(run).values()).index(start) + 1 if start else 0  # later ones are moved or replaced
    more = max(1, files - kept)
    free = shutil.disk_usage(next(folder for folder in (run, *run.resolve().parents) if folder.exists())).free
    speed, where = _speed(config, model)
    everything = [
        ("config", f"{config.model.architecture}, {total:,} parameters ({body:,} without embeddings), {config.sink}"),
        ("data", f"{data}: {train.tokens:,} tokens, {layout.rows:,} rows, fingerprint {train.fingerprint[:12]}"),
        ("batch", f"{plan.rows} rows = {processes} processes × {plan.accumulation} micro-batches × {plan.micro_rows}"),
        ("run", f"{steps:,} steps × {config.training.batch_tokens:,} = {tokens:,} tokens, "
         f"{tokens / train.tokens:.2f} × the data"),
        ("speed", f"{speed * processes:,.0f} tokens/s on {processes} of {where}"),
        ("time", f"{tokens / (speed * processes) / 3600:,.1f} hours, without saving and validation"),
        ("checkpoint", f"{_gigabytes(size)} each, {files} at a time at most: {_gigabytes(size * files)}"),
        ("disk", f"{_gigabytes(free)} free for {run}"),
        ("logging", logging),
        ("folder", f"{run} resumes from {start.name}" if start else f"{run} starts at step 0"),
    ]  # fmt: skip
    for name, value in everything:
        put(f"{name:>11}  {value}")
    if free < size * more:
        raise UserError(
            f"{run} needs up to {_gigabytes(size * more)} for {more} more checkpoints, {_gigabytes(free)} are free; "
            "lower checkpoints.keep or keep_every, or choose another --output"
        )
    return 0


def _at_a_time(config: PretrainConfig) -> int:
    """Most checkpoints in the run folder at once: those kept for good, the latest, and the one being written."""
    steps = config.schedule.steps
    staying = sum(config.keeps(step) for step in range(steps + 1))
    passing = sum((config.saves(step) or step == steps) and not config.keeps(step) for step in range(1, steps + 1))
    return staying + min(passing, config.checkpoints.keep) + 1


def _precision(config: PretrainConfig) -> Precision:
    """The run's precision. `auto` is resolved for this machine, since the machine of the run is not known."""
    on_gpu = config.training.device == "cuda" or (config.training.device == "auto" and torch.cuda.is_available())
    return config.training.precision if config.training.precision != "auto" else ("bf16" if on_gpu else "fp32")


def _speed(config: PretrainConfig, model: PreTrainedModel) -> tuple[float, str]:
    """Tokens/s of one process, and a description of its device.

    Measured with one micro-batch on a GPU, or with one row on a CPU. If the run needs a GPU and there is none here, the
    speed is an assumption about a known GPU.
    """
    device = config.training.device
    if device != "cpu" and not torch.cuda.is_available():
        peak = PEAKS[ASSUMED_GPU]
        speed = ASSUMED_MFU * peak / flops_per_token(model, config.data.sequence)
        return speed, f"{ASSUMED_GPU} at {ASSUMED_MFU:.0%} MFU (assumed: no GPU here)"
    name = "cuda" if device == "auto" else device
    model.set_attn_implementation(CAUSAL)
    model.set_output_embeddings(LossHead(head_of(model), config.training.head_chunk))
    model.to(name)
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    rows = config.training.micro_rows if name == "cuda" else 1
    ids = torch.zeros(rows, config.data.sequence, dtype=torch.long, device=name)
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        half = torch.autocast(name, torch.bfloat16, enabled=_precision(config) == "bf16")
        with half, fast_products():
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            head_of(model)(hidden.flatten(0, 1), ids.flatten())[0].backward()
        if name == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    what = torch.cuda.get_device_name() if name == "cuda" else "this CPU"
    return ids.numel() / seconds, f"{what} (measured: one micro-batch, without the optimiser)"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
