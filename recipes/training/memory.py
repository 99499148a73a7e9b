"""A check, before a model is loaded, that it fits into the memory of this machine."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from sinkmodel.checkpoint import Recipe, find_checkpoint, read_checkpoint
from sinkmodel.errors import UserError
from sinkmodel.names import find_model
from sinkmodel.row_file import read_row

GROUPS = Path("/sys/fs/cgroup")
CONTROL_GROUPS = (
    ("memory.max", "memory.current", "file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
)
# Per parameter: the weight in fp32, and if all are trained, its gradient and two moments.
BYTES = {"all": 16, "sink": 4, "sink+norms": 4}


def refuse_too_little_memory(name: str, step: int | None, parts: str, device: str = "cpu") -> None:
    """Raises UserError if the free memory is too small to load the weights in `name` and train `parts` of them.

    A model that is trained on a GPU needs main memory for its weights only.
    """
    count, free = parameters_of(name, step), available_memory()
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    needed = None if count is None else count * (BYTES["sink"] if on_gpu else BYTES[parts])
    if needed is not None and free is not None and needed > free:
        to_train = "to load them" if on_gpu else f"to train {parts} of them"
        raise UserError(
            f"{name} has {count:,} parameters; {to_train} takes {needed / 1e9:.1f} GB of "
            f"memory{'' if on_gpu else ' and activations on top'}, and {free / 1e9:.1f} GB are free; take a smaller "
            "model or a larger machine"
            + (", or train less (training.parts sink)" if parts == "all" and not on_gpu else "")
        )


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
    """Number of parameters of a model, from the headers of its files; None if they do not state it."""
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
        return sum(map(_numbers_in, path.glob("*.safetensors"))) or None
    if kind == "gguf":
        try:
            from gguf import GGUFReader

            return sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
        except Exception:  # the package is missing, or the file damaged: loading reports it
            return None
    return None


def _numbers_in(path: Path) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as weights:
            return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    except (SafetensorError, OSError):  # loading reports it
        return 0
