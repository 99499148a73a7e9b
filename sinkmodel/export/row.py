"""Export a checkpoint of a frozen run as a small file: the sinks' rows, perhaps norms, and the base's name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from sinkmodel.bases import PARTS
from sinkmodel.checkpoint import Recipe, find_checkpoint, read_checkpoint, verify, weights_of
from sinkmodel.choices import Dtype
from sinkmodel.errors import UserError
from sinkmodel.files import atomic_file
from sinkmodel.row_file import SUFFIX, Row, vocabulary_sha256


def export_row(checkpoint: Path, output: Path, dtype: Dtype = "float32", step: int | None = None) -> Path:
    """Write the row file `output` from a checkpoint file or a run folder. The base is not read.

    Args:
        dtype: of the weights, the name of a torch dtype.
        step: for a run folder, the checkpoint of this step; None for the newest.

    Raises UserError if the checkpoint holds a whole model, or if `output` exists.
    """
    if output.exists():
        raise UserError(f"{output} already exists; choose another file or remove it")
    file = find_checkpoint(checkpoint, step)
    verify(file)
    content = read_checkpoint(file)
    recipe = Recipe.from_dict(content["recipe"])
    base, text = recipe.base, recipe.tokenizer
    if recipe.parts == "all" or base is None:
        raise UserError(
            f"{file} holds a whole model; only runs with training.parts {' or '.join(PARTS[1:])} have a row; "
            "export it with --format transformers"
        )
    if base.name.endswith(SUFFIX):
        raise UserError(f"{file} started from the row {base.name}; export the whole model with --format transformers")
    command, commit = (recipe.provenance.get(name) for name in ("command", "git_commit"))
    row = Row(
        base=base,
        parts=recipe.parts,
        sink_ids=recipe.sink.ids(text.vocabulary),
        step=recipe.step,
        tokens=recipe.tokens,
        vocabulary_sha256=vocabulary_sha256(text),
        weights={name: weight.to(getattr(torch, dtype)) for name, weight in weights_of(content).items()},
        more={
            "tokenizer_sha256": hashlib.sha256(text.definition.encode()).hexdigest(),
            **({"command": command} if isinstance(command, str) else {}),
            **({"git_commit": commit} if isinstance(commit, str) else {}),
        },
    )
    with atomic_file(output) as aside:
        aside.write_bytes(row.to_bytes())
    return output
