"""How a model of ours was trained, as its checkpoint or its exported folder states it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sinkmodel.checkpoint import Recipe, find_checkpoint, read_checkpoint
from sinkmodel.errors import UserError
from sinkmodel.export import PROVENANCE
from sinkmodel.files import read_json


def read_provenance(name: str, step: int | None = None) -> dict[str, Any]:
    """What sink-pretrain recorded, with `step`, `tokens`, `base` and `parts`: of a run, a checkpoint or an export.

    Empty for a model from elsewhere. `step` is for a run folder: its checkpoint of this step, in place of the newest.
    """
    path = Path(name)
    if (path / PROVENANCE).is_file():
        content = read_json(path / PROVENANCE)
        if not isinstance(content, dict):
            raise UserError(f"{path / PROVENANCE} is not a JSON object; export the model again")
        return content
    if (path / "checkpoints").is_dir() or path.suffix == ".ckpt":
        recipe = Recipe.from_dict(read_checkpoint(find_checkpoint(path, step))["recipe"])
        return recipe.stated()
    return {}
