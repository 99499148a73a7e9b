"""Reading what training writes: a run folder, its checkpoints, and what they say about themselves.

A checkpoint is Lightning's file, `RUN/checkpoints/step1000.ckpt`. Beside Lightning's own keys it holds `recipe`, which
makes it complete in itself: model config, sink, tokenizer, step, tokens, run config, data fingerprint, git commit.
It is read with `weights_only=True`: a file from a stranger is data.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sinkmodel.errors import UserError
from sinkmodel.sinks import SinkConfig, write_sink
from sinkmodel.tokenizer import TextTokenizer, load_tokenizer

FORMAT = 1
PREFIX = "model."  # of the transformers model inside the LightningModule's state


@dataclass(frozen=True)
class Recipe:
    """What a checkpoint says about itself, beside its weights."""

    model_config: dict[str, Any]  # transformers' config.to_dict()
    sink: SinkConfig
    tokenizer: TextTokenizer
    step: int  # optimiser steps done
    tokens: int  # text and sink tokens that went through the model
    provenance: dict[str, Any]  # run config, data fingerprint, git commit, versions

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers: what `torch.load(weights_only=True)` admits."""
        return {
            "format": FORMAT,
            "model_config": self.model_config,
            "sink": {"kind": self.sink.kind, "count": self.sink.count},
            "tokenizer": dict(vars(self.tokenizer)),
            "step": self.step,
            "tokens": self.tokens,
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Recipe:
        return cls(
            model_config=record["model_config"],
            sink=SinkConfig(**record["sink"]),
            tokenizer=TextTokenizer(**record["tokenizer"]),
            step=record["step"],
            tokens=record["tokens"],
            provenance=record["provenance"],
        )


def checkpoint_steps(run: Path) -> dict[int, Path]:
    """Complete checkpoints of a run by step, in order."""
    found = {
        int(match[1]): path
        for path in (run / "checkpoints").glob("step*.ckpt")
        if (match := re.fullmatch(r"step(\d+)\.ckpt", path.name))
    }
    return dict(sorted(found.items()))


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """A checkpoint file as it is; of a run folder the newest one, or that of `step`."""
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run folder or a checkpoint file")
    steps = checkpoint_steps(path)
    if not steps:
        raise UserError(f"{path} holds no checkpoints/step*.ckpt; give the folder that sink-pretrain wrote")
    if step is None:
        return steps[max(steps)]
    if step not in steps:
        raise UserError(f"{path} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    return steps[step]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The whole checkpoint, tensors mapped from the file rather than read. Raises UserError where it is none."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        Recipe.from_dict(checkpoint["recipe"])
        checkpoint["state_dict"].items()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is not a complete checkpoint of sink-pretrain ({reason[:120]}); take another of the run"
        ) from None
    return checkpoint


def load_model_of(checkpoint: dict[str, Any], path: Path) -> PreTrainedModel:
    """The transformers model in a checkpoint, in eval mode; `path` is for messages.

    Raises UserError where weights and model config do not agree in names or shapes.
    """
    recipe = Recipe.from_dict(checkpoint["recipe"])
    fields = dict(recipe.model_config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    state = weights_of(checkpoint)
    check_shapes(state, model, path)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    write_sink(model.config, recipe.sink, recipe.sink.ids(recipe.tokenizer.vocabulary))
    return model.eval()


def weights_of(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The transformers model's own state dict inside a checkpoint."""
    state = checkpoint["state_dict"]
    return {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}


def check_shapes(state: dict[str, torch.Tensor], model: torch.nn.Module, path: Path) -> None:
    """Raises UserError naming the first weight that is missing, unknown or of another shape."""
    expected = model.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        want = tuple(expected[name].shape) if name in expected else "nothing"
        have = tuple(state[name].shape) if name in state else "nothing"
        if want != have:
            raise UserError(
                f"{path} is a checkpoint of another shape: {name} is {have}, this model has {want}; "
                "use the config that it was trained with"
            )


def load_checkpoint(path: Path, step: int | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, list[int]]:
    """Model (eval mode, fp32, CPU), tokenizer (puts the sink in front) and sink ids of a run or checkpoint."""
    file = find_checkpoint(Path(path), step)
    checkpoint = read_checkpoint(file)
    recipe = Recipe.from_dict(checkpoint["recipe"])
    model = load_model_of(checkpoint, file)
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.sink, model.config.max_position_embeddings)
    return model, tokenizer, recipe.sink.ids(recipe.tokenizer.vocabulary)
