"""Read what training writes: a run folder, its checkpoints, and their records.

A checkpoint is a Lightning file, `RUN/checkpoints/step1000.ckpt`. Besides Lightning's own keys it holds `recipe`, which
makes it self-contained: model config, sink, tokenizer, step, tokens, run config, data fingerprint, git commit.
It is read with `weights_only=True`, since an untrusted file must be only data.
"""

from __future__ import annotations

import contextlib
import csv
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
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
# Raised by torch.load, and by reading a record of another form, for truncated, altered or unrelated files.
NOT_A_CHECKPOINT = (
    OSError, ValueError, RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError
)  # fmt: skip
PREFIX = "model."  # prefix of the transformers model in the LightningModule's state


@dataclass(frozen=True)
class Recipe:
    """The record that describes a checkpoint, stored beside its weights."""

    model_config: dict[str, Any]  # transformers' config.to_dict()
    sink: SinkConfig
    tokenizer: TextTokenizer
    step: int  # optimiser steps done
    tokens: int  # text and sink tokens that the model processed
    provenance: dict[str, Any]  # run config, data fingerprint, git commit, versions
    base: Base | None = None  # the model that training started from
    parts: str = "all"  # the trained parts, one of PARTS; the rest is the base's and not in the checkpoint
    generation: dict[str, Any] | None = None  # the base's generation settings: `bases.generation_of`

    def stated(self) -> dict[str, Any]:
        """`provenance`, together with the step, the tokens, the base and the trained parts."""
        base = {"base": asdict(self.base), "parts": self.parts} if self.base is not None else {}
        return {"step": self.step, "tokens": self.tokens, **base, **self.provenance}

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts, strings and numbers, which `torch.load(weights_only=True)` accepts."""
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
    """Complete checkpoints of a run, by step in ascending order."""
    found = {
        int(match[1]): path
        for path in (run / "checkpoints").glob("step*.ckpt")
        if (match := re.fullmatch(r"step(\d+)\.ckpt", path.name))
    }
    return dict(sorted(found.items()))


def write_manifest(folder: Path, name: str | None = None, digest: str | None = None) -> None:
    """Write `SHA256SUMS` for the checkpoints in a folder, in the format of `sha256sum --check`.

    Args:
        name: file name of a checkpoint that is about to appear; None for none.
        digest: its SHA-256.
    """
    digests = {known: old for known, old in _read_manifest(folder).items() if (folder / known).exists()}
    if name is not None and digest is not None:
        digests[name] = digest
    with atomic_file(folder / MANIFEST) as aside:
        aside.write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()), encoding="utf-8")


def verify(path: Path) -> None:
    """Raise UserError if a checkpoint's checksum differs from the recorded one. Without a record it passes."""
    known = _read_manifest(path.parent).get(path.name)
    if known is not None and sha256_of(path) != known:
        raise UserError(f"{path} is not what was written: its checksum in {MANIFEST} differs; use another of the run")


@contextlib.contextmanager
def verifying(path: Path) -> Iterator[Callable[[], None]]:
    """`verify` a checkpoint in a thread while the block uses it. Yields a function that waits for the result.

    Call it before the block makes anything visible: it raises the UserError of `verify`. If the block fails for another
    reason, that UserError comes first, since a damaged file explains the failure.
    """
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(verify, path)
        try:
            yield checked.result
        except Exception:
            checked.result()
            raise


def digest_of(path: Path) -> str:
    """SHA-256 of a checkpoint when it was written; if that was not recorded, of the file as it is now."""
    return _read_manifest(path.parent).get(path.name) or sha256_of(path)


def _read_manifest(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def read_metrics(run: Path) -> list[dict[str, str]]:
    """The lines of a run's metrics.csv, as text; empty if there is no file. A truncated last line is left out."""
    path = run / "metrics.csv"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(complete)) if None not in row.values()]


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """The given checkpoint file; of a run folder, its newest checkpoint or that of `step`."""
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
    """Load tensors and plain values that torch.save wrote; with `mmap`, tensors are mapped from the file.

    Raises UserError for a file that holds objects or code; torch's own message advises to load these nevertheless.
    Raises one of NOT_A_CHECKPOINT if the file is damaged or unrelated.
    """
    with path.open("rb") as file:
        start = file.read(4)
    archive = start == b"PK\3\4"
    if not archive and not start.startswith(b"\x80"):
        raise ValueError("torch.save did not write it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they repeat what the error says
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and archive)
    except (RuntimeError, pickle.UnpicklingError) as error:
        if isinstance(error, RuntimeError) and "weights_only" not in str(error):
            raise
        raise UserError(
            f"{path} holds objects or code, not only tensors and plain values; it is not loaded, as it could run "
            "anything here: get its weights as safetensors, or convert them where you trust the file"
        ) from None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The whole checkpoint, with tensors mapped from the file. Raises UserError if it is not a checkpoint."""
    try:
        checkpoint = load_tensors(path, mmap=True)
        Recipe.from_dict(checkpoint["recipe"])
        checkpoint["state_dict"].items()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except NOT_A_CHECKPOINT as error:
        raise UserError(
            f"{path} is not a complete checkpoint of sink-pretrain ({first_line(error)}); use another of the run"
        ) from None
    return checkpoint


def weights_of(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict of the transformers model in a checkpoint."""
    state = checkpoint["state_dict"]
    return {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}


def check_shapes(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise UserError that names the first weight that is missing, unknown or of an unexpected shape."""
    for name in sorted(expected.keys() | state.keys()):
        want = tuple(expected[name].shape) if name in expected else "nothing"
        have = tuple(state[name].shape) if name in state else "nothing"
        if want != have:
            raise UserError(
                f"{path} is a checkpoint of another shape: {name} has {have}, this model expects {want}; "
                "use the config that it was trained with"
            )
