"""A check, before a model is loaded, that it fits into the memory of this machine and its GPUs."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from recipes.training.processes.ranks import World
from recipes.training.settings import PretrainConfig, TrainingSettings
from sinkmodel.checkpoint import Recipe, find_checkpoint, read_checkpoint
from sinkmodel.errors import UserError
from sinkmodel.hub_token import hub_token
from sinkmodel.names import find_model
from sinkmodel.row_file import read_row

GROUPS = Path("/sys/fs/cgroup")
CONTROL_GROUPS = (
    ("memory.max", "memory.current", "file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
)
WEIGHT, GRADIENT, MOMENTS = 4, 4, 8  # bytes per parameter, in fp32
SHARDED = {  # which of them a strategy splits between the processes
    "fsdp2": (True, True, True),
    "deepspeed_stage_1": (False, False, True),
    "deepspeed_stage_2": (False, True, True),
    "deepspeed_stage_3": (True, True, True),
}


def refuse_too_little_memory(config: PretrainConfig, count: int | None, world: World) -> None:
    """Raises UserError if the free memory is too small to load the model in `model.start_from` and to train it.

    Every process loads all weights into main memory. On a CPU it trains them there, else in the memory of its GPU.
    Activations are not counted, so a model that passes may still be too large.

    Args:
        count: parameters of the model; None if unknown, then nothing is checked.
        world: the place of this process. Only the first one of a machine checks main memory, for all of them.
    """
    if count is None:
        return
    training = config.training
    on_gpu = training.device == "cuda" or (training.device == "auto" and torch.cuda.is_available())
    to_load, to_train = count * WEIGHT, math.ceil(count * bytes_per_parameter(training, world.size))
    if world.local_rank == 0:
        each, free = to_load if on_gpu else max(to_load, to_train), available_memory()
        if free is not None and each * world.local_size > free:
            raise _too_large(config, count, not on_gpu, each * world.local_size, free, world.local_size)
    if on_gpu and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(world.local_rank)
        if to_train > free:
            raise _too_large(config, count, True, to_train, free, place=f" on GPU {world.local_rank}")


def _too_large(
    config: PretrainConfig, count: int, train: bool, needed: int, free: int, processes: int = 1, place: str = ""
) -> UserError:
    parts = config.training.parts
    purpose = f"train them (training.parts {parts})" if train else "load them"
    share = f" in {processes} processes" if processes > 1 else ""
    activations = " and activations on top" if train else ""
    return UserError(
        f"{config.model.start_from} has {count:,} parameters; to {purpose}{share} takes {needed / 1e9:.1f} GB of "
        f"memory{place}{activations}, and {free / 1e9:.1f} GB are free; take a smaller model or a larger machine"
        + (", or start fewer processes" if processes > 1 else "")
        + (", or train less (training.parts sink)" if train and parts == "all" else "")
    )


def bytes_per_parameter(training: TrainingSettings, processes: int) -> float:
    """Bytes that each process needs for each parameter while it trains, without activations."""
    trained = (WEIGHT, GRADIENT, MOMENTS) if training.parts == "all" else (WEIGHT, 0, 0)
    sharded = SHARDED.get(training.strategy, (False, False, False))
    return sum(size / processes if split else size for size, split in zip(trained, sharded))


def available_memory() -> int | None:
    """Bytes that this process can still allocate, within the machine and the job's control group; None if unknown."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
    except (OSError, ValueError):
        pass
    for limit, used, cached in CONTROL_GROUPS:
        try:
            about = dict(line.split() for line in (GROUPS / "memory.stat").read_text(encoding="ascii").splitlines())
            # The kernel frees its file cache when memory is short.
            in_use = int((GROUPS / used).read_text(encoding="ascii")) - int(about[cached])
            found.append(int((GROUPS / limit).read_text(encoding="ascii")) - in_use)
        except (OSError, ValueError, KeyError):  # other version of cgroups, or no limit ("max")
            continue
    return min(found, default=None)


def parameters_of(name: str, step: int | None = None) -> int | None:
    """Number of parameters of a model, from the headers of its files; None if they do not state it.

    For a Hub name only the headers are downloaded. If the Hub does not answer, those in the local cache are read.
    """
    kind, path = find_model(name)
    if kind in ("run", "file") and (kind == "run" or path.suffix == ".ckpt"):
        content = read_checkpoint(find_checkpoint(path, step))
        recipe = Recipe.from_dict(content["recipe"])
        if recipe.parts != "all" and recipe.base is not None:
            return parameters_of(recipe.base.name, recipe.base.step)
        return sum(value.numel() for value in content["state_dict"].values())
    if kind == "row":
        base = read_row(path).base
        return parameters_of(base.name, base.step)
    if kind == "folder":
        return _numbers_in_folder(path)
    if kind == "hub":
        return _numbers_on_hub(name)
    if kind == "gguf":
        try:
            from gguf import GGUFReader

            return sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
        except Exception:  # the package is missing, or the file damaged: loading reports it
            return None
    return None


def _numbers_on_hub(name: str) -> int | None:
    from huggingface_hub import HfApi, try_to_load_from_cache

    hub_token()  # raises if the token is malformed
    try:
        return sum(HfApi().get_safetensors_metadata(name).parameter_count.values())
    except Exception:  # no such repository, no safetensors, no network: loading reports it
        config = try_to_load_from_cache(name, "config.json")
        return _numbers_in_folder(Path(config).parent) if isinstance(config, str) else None


def _numbers_in_folder(path: Path) -> int | None:
    """Numbers in the weights that transformers reads; some repositories hold a second copy under other names."""
    whole = path / "model.safetensors"
    files = [whole] if whole.is_file() else [*path.glob("model-*.safetensors")] or path.glob("*.safetensors")
    return sum(map(_numbers_in, files)) or None


def _numbers_in(path: Path) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as weights:
            return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    except (SafetensorError, OSError):  # loading reports it
        return 0
