"""Where the GPU's tests and measurements run, and how large they are.

A rehearsal (`REHEARSE=1`) runs the same lines on a CPU with tiny sizes. Only `sized` reads it, so
every line of a rehearsed script has run before it runs on a GPU, except for PyTorch's kernels.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import torch

from sinkmodel.errors import UserError

T = TypeVar("T")
REHEARSE = os.environ.get("REHEARSE", "") not in ("", "0")


def sized(on_gpu: T, in_rehearsal: T) -> T:
    return in_rehearsal if REHEARSE else on_gpu


DEVICE = sized("cuda", "cpu")
DTYPE = sized("bfloat16", "float32")  # of models that are measured; a CPU is slow in half precision
# Options of torch.compile for a decoding step. reduce-overhead records CUDA graphs; a rehearsal only traces.
STEP: dict[str, Any] = sized({"mode": "reduce-overhead"}, {"backend": "eager"})
# The same for a single function with few different shapes, such as flex_attention.
KERNEL: dict[str, Any] = {"dynamic": False, **sized({}, {"backend": "aot_eager"})}


def shape_file(name: str) -> Path:
    """A shape of configs/models, or that of rehearsals."""
    here = Path(__file__).parent
    return sized(here.parents[1] / "configs" / "models" / f"{name}.yaml", here / "rehearsal.yaml")


def need_device() -> None:
    """Raise UserError if torch sees no GPU, unless this is a rehearsal."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "torch sees no GPU: install a build of torch for your driver, or give an environment that has one as "
            "GPU_PYTHON=…; REHEARSE=1 runs the same with tiny sizes on the CPU"
        )


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "this CPU (a rehearsal: the numbers mean nothing)"


def free() -> None:
    """Give the memory of what was measured before back to the device; compiled code holds some of it too."""
    torch._dynamo.reset()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
