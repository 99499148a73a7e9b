"""How a model of ours was trained, as recorded in its checkpoint or its exported folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sinkmodel.checkpoint import Recipe, find_checkpoint, read_checkpoint
from sinkmodel.errors import UserError
from sinkmodel.files import read_json
from sinkmodel.names import find_model
from sinkmodel.row_file import read_row

PROVENANCE = "training.json"  # in an exported folder


def read_provenance(name: str, step: int | None = None) -> dict[str, Any]:
    """The record of sink-pretrain about a run, checkpoint, export or row, with `step`, `tokens`, `base` and `parts`.

    Empty for a third-party model. With `step`, a run folder's checkpoint of that step is read instead of the newest.
    """
    path = Path(name)
    if (path / PROVENANCE).is_file():
        content = read_json(path / PROVENANCE)
        if not isinstance(content, dict):
            raise UserError(f"{path / PROVENANCE} is not a JSON object; export the model again")
        return content
    kind, path = find_model(name)
    if kind == "run" or path.suffix == ".ckpt":
        return Recipe.from_dict(read_checkpoint(find_checkpoint(path, step))["recipe"]).stated()
    if kind == "row":
        row = read_row(path)
        return {"step": row.step, "tokens": row.tokens, "base": asdict(row.base), "parts": row.parts, **row.more}
    return {}
