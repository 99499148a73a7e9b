"""A model with random weights and sizes from a YAML file: enough to measure time and memory."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, PretrainedConfig

from sinkmodel.errors import UserError
from sinkmodel.loading import LoadedModel
from sinkmodel.models import transformers_config
from sinkmodel.shapes import ModelShape


def read_shape(path: Path) -> ModelShape:
    """The sizes under `model:` in a YAML file. Raises UserError if they are missing or are not those of a model."""
    if not path.is_file():
        raise UserError(f"--shape {path} does not exist; give a .yaml such as configs/models/tiny.yaml")
    try:
        return ModelShape(**(yaml.safe_load(path.read_text(encoding="utf-8")) or {})["model"])
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).replace("ModelShape.__init__() ", "").split())
        raise UserError(
            f"{path} has no shape of a model ({reason}); it needs `model:` with sizes, as in configs/models/tiny.yaml"
        ) from None


def config_of(shape: ModelShape) -> PretrainedConfig:
    """The transformers config of a shape. If the shape has no vocabulary size, the embedding has 50,304 rows."""
    return transformers_config(shape, shape.vocabulary or 50304)


def load_shape(path: Path, dtype: str, device: str | None) -> LoadedModel:
    """A model of that shape, created on its device and in its dtype, so that no larger copy ever exists."""
    config = config_of(read_shape(path))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "meta":
        raise UserError("device 'meta' has shapes but no numbers; use cpu, or a GPU")
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", dtype=getattr(torch, dtype)
            ).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the model cannot be created on device {device!r}: {str(error).splitlines()[0]}") from None
    return LoadedModel(model.requires_grad_(False), None, [], f"random weights, {path.stem}")
