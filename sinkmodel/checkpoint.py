"""Reading what training writes: a run folder, its checkpoints, and what they say about themselves.

A checkpoint is Lightning's file, `RUN/checkpoints/step1000.ckpt`. Beside Lightning's own keys it holds `recipe`, which
makes it complete in itself: model config, sink, tokenizer, step, tokens, run config, data fingerprint, git commit.
It is read with `weights_only=True`: a file from a stranger is data.
"""

from __future__ import annotations

import csv
import io
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sinkmodel.bases import Base
from sinkmodel.errors import UserError, first_line
from sinkmodel.files import atomic_file, sha256_of
from sinkmodel.sinks import SinkConfig
from sinkmodel.tokenizer import TextTokenizer

FORMAT = 1
MANIFEST = "SHA256SUMS"
# What torch.load, and reading a record of another form, raise on files that are cut short, altered or something else.
NOT_A_CHECKPOINT = (
    OSError, ValueError, RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError
)  # fmt: skip
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
    base: Base | None = None  # the model that training started from
    parts: str = "all"  # what was trained, one of PARTS; all else is the base's, and not in the checkpoint
    generation: dict[str, Any] | None = None  # how the base wants to be generated from: `bases.generation_of`

    def stated(self) -> dict[str, Any]:
        """`provenance`, and beside it what was trained, from what, and how far."""
        base = {"base": asdict(self.base), "parts": self.parts} if self.base is not None else {}
        return {"step": self.step, "tokens": self.tokens, **base, **self.provenance}

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
            "base": None if self.base is None else asdict(self.base),
            "parts": self.parts,
            "generation": self.generation,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Recipe:
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}, this program reads {FORMAT}")
        return cls(
            model_config=record["model_config"],
            sink=SinkConfig(**record["sink"]),
            tokenizer=TextTokenizer(**record["tokenizer"]),
            step=record["step"],
            tokens=record["tokens"],
            provenance=record["provenance"],
            base=Base(**record["base"]) if record.get("base") else None,
            parts=record.get("parts", "all"),
            generation=record.get("generation"),
        )


def checkpoint_steps(run: Path) -> dict[int, Path]:
    """Complete checkpoints of a run by step, in order."""
    found = {
        int(match[1]): path
        for path in (run / "checkpoints").glob("step*.ckpt")
        if (match := re.fullmatch(r"step(\d+)\.ckpt", path.name))
    }
    return dict(sorted(found.items()))


def write_manifest(folder: Path, name: str | None = None, digest: str | None = None) -> None:
    """`SHA256SUMS` of the checkpoints in a folder, as `sha256sum --check` reads it; `name` is about to appear."""
    digests = {known: old for known, old in _read_manifest(folder).items() if (folder / known).exists()}
    if name is not None and digest is not None:
        digests[name] = digest
    with atomic_file(folder / MANIFEST) as aside:
        aside.write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()), encoding="utf-8")


def verify(path: Path) -> None:
    """Raises UserError where a checkpoint's bytes are not those that were written. One without an entry passes."""
    known = _read_manifest(path.parent).get(path.name)
    if known is not None and sha256_of(path) != known:
        raise UserError(
            f"{path} is not what was written: its checksum in {MANIFEST} is another; take another of the run"
        )


def digest_of(path: Path) -> str:
    """SHA-256 of a checkpoint, as it was when it was written; of one without an entry, as it is."""
    return _read_manifest(path.parent).get(path.name) or sha256_of(path)


def _read_manifest(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def read_metrics(run: Path) -> list[dict[str, str]]:
    """The lines of a run's metrics.csv, as text; none where there is no file. A line that a kill cut is left out."""
    path = run / "metrics.csv"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(complete)) if None not in row.values()]


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """A checkpoint file as it is; of a run folder the newest one, or that of `step`."""
    if path.is_file():
        if step is not None:
            raise UserError(f"{path} is one checkpoint; give its run folder to choose step {step}")
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


def load_tensors(path: Path, mmap: bool = False) -> Any:
    """Tensors and plain values that torch.save wrote; `mmap` maps the tensors from the file.

    Raises UserError for a file with objects or code, which torch refuses with the advice to load it all the same, and
    one of NOT_A_CHECKPOINT for what is damaged or something else.
    """
    with path.open("rb") as file:
        start = file.read(4)
    archive = start == b"PK\3\4"
    if not archive and not start.startswith(b"\x80"):
        raise ValueError("torch.save did not write it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they say what the error says
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and archive)
    except (RuntimeError, pickle.UnpicklingError) as error:
        if isinstance(error, RuntimeError) and "weights_only" not in str(error):
            raise
        raise UserError(
            f"{path} holds objects or code, not only tensors and plain values; it is not loaded, as it could run "
            "anything here: get its weights as safetensors, or convert them where you trust the file"
        ) from None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The whole checkpoint, tensors mapped from the file rather than read. Raises UserError where it is none."""
    try:
        checkpoint = load_tensors(path, mmap=True)
        Recipe.from_dict(checkpoint["recipe"])
        checkpoint["state_dict"].items()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except NOT_A_CHECKPOINT as error:
        raise UserError(
            f"{path} is not a complete checkpoint of sink-pretrain ({first_line(error)}); take another of the run"
        ) from None
    return checkpoint


def weights_of(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The transformers model's own state dict inside a checkpoint."""
    state = checkpoint["state_dict"]
    return {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}


def check_shapes(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raises UserError naming the first weight that is missing, unknown or of another shape than expected."""
    for name in sorted(expected.keys() | state.keys()):
        want = tuple(expected[name].shape) if name in expected else "nothing"
        have = tuple(state[name].shape) if name in state else "nothing"
        if want != have:
            raise UserError(
                f"{path} is a checkpoint of another shape: {name} is {have}, this model has {want}; "
                "use the config that it was trained with"
            )
