"""Row files: the weights that a run of `parts` sink or sink+norms trained, with the name of its base, in a few kB.

A row file is safetensors with strings as metadata, so any program can read it:

    format, version         sinkmodel-row, 1
    base                    name of the base for `load_model`; a file or folder by its absolute path
    base_fingerprint        SHA-256 of its weights (`bases.weights_fingerprint`); base_step, base_license if known
    sink_ids                JSON list; the file's `….sink_rows` are their rows of the embedding
    parts, step, tokens     trained parts, optimiser steps done, tokens that the model processed
    vocabulary_sha256       of the text tokens and their ids; checked when the file is loaded
    tokenizer_sha256        of the tokenizer.json that the data was prepared with
    command, git_commit     of the run, if known

All other tensors have their names in the base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sinkmodel.bases import SINK_ROWS, Base
from sinkmodel.errors import UserError, first_line
from sinkmodel.shapes import PARTS
from sinkmodel.sinks import RESERVED_ROWS
from sinkmodel.tokenizer import TextTokenizer

SUFFIX = ".safetensors"
FORMAT, VERSION = "sinkmodel-row", "1"


@dataclass(frozen=True)
class Row:
    """The content of a row file.

    Args:
        base: the model that the row belongs to.
        parts: the trained parts, `sink` or `sink+norms`.
        sink_ids: ids of the sinks, the first ones after the text vocabulary.
        step: optimiser steps done.
        tokens: tokens that the model processed in training.
        vocabulary_sha256: `vocabulary_sha256` of the base's text tokenizer.
        weights: `….sink_rows`, [sinks, D], and other weights under their names in the base.
        more: strings for people: tokenizer_sha256, command, git_commit.
    """

    base: Base
    parts: str
    sink_ids: list[int]
    step: int
    tokens: int
    vocabulary_sha256: str
    weights: Mapping[str, Tensor]
    more: Mapping[str, str]

    def to_bytes(self) -> bytes:
        """The content of the file. Equal rows give equal bytes."""
        base = {"base": self.base.name, "base_fingerprint": self.base.fingerprint}
        if self.base.step is not None:
            base["base_step"] = str(self.base.step)
        if self.base.license is not None:
            base["base_license"] = self.base.license
        about = {
            "format": FORMAT,
            "version": VERSION,
            **base,
            "parts": self.parts,
            "sink_ids": json.dumps(self.sink_ids),
            "step": str(self.step),
            "tokens": str(self.tokens),
            "vocabulary_sha256": self.vocabulary_sha256,
            **self.more,
        }
        return _in_order(save({name: weight.contiguous() for name, weight in self.weights.items()}, about))


def read_row(path: Path) -> Row:
    """Read a row file. Raises UserError if it is another kind of file, or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({first_line(error)}); copy it again") from None
    if about.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a row that sink-export --format row wrote; for the weights of a whole model give its folder"
        )
    if about.get("version") != VERSION:
        raise UserError(f"{path} has version {about.get('version')} of the format, this program reads {VERSION}")
    more = {name: about[name] for name in ("tokenizer_sha256", "command", "git_commit") if name in about}
    try:
        step = int(about["base_step"]) if "base_step" in about else None
        base = Base(about["base"], about["base_fingerprint"], step, about.get("base_license"))
        numbers = int(about["step"]), int(about["tokens"])
        row = Row(
            base, about["parts"], json.loads(about["sink_ids"]), *numbers, about["vocabulary_sha256"], weights, more
        )
        _check(row)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is a damaged row ({first_line(error)}); export or copy it again") from None
    return row


def vocabulary_sha256(text: TextTokenizer) -> str:
    """SHA-256 of all tokens and ids, independent of how a version of `tokenizers` writes the file."""
    names = sorted((number, name) for name, number in text.backend().get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _check(row: Row) -> None:
    """Raise ValueError for a row that does not fit its sinks, or whose base is a row as well."""
    ids, rows = row.sink_ids, [value for name, value in row.weights.items() if name.endswith(f".{SINK_ROWS}")]
    if not isinstance(ids, list) or not 1 <= len(ids) <= RESERVED_ROWS or ids != list(range(ids[0], ids[0] + len(ids))):
        raise ValueError(f"its sinks are {ids!r}")
    if len(rows) != 1 or rows[0].ndim != 2 or len(rows[0]) != len(ids):
        raise ValueError(f"it has no {SINK_ROWS} for the sinks {ids}")
    if row.parts not in PARTS[1:]:
        raise ValueError(f"its parts are {row.parts!r}")
    if row.base.name.endswith(SUFFIX):
        raise ValueError("its base is a row as well")


def _in_order(content: bytes) -> bytes:
    """Sort the header's keys of a safetensors file, since the library writes the metadata in random order."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]
