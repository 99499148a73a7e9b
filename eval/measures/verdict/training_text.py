"""What models say of the text that they were trained on: is it among the test text, and was it the same for twins?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sinkmodel.errors import UserError

HEAD = 64  # a document is known by its first tokens; no more are compared
AT_ONCE = 1 << 20  # training documents looked at together


def provenance_of(name: str) -> dict[str, Any]:
    """The provenance that sink-pretrain wrote, with `step` and `tokens`: of a run, a checkpoint or an exported folder.

    Empty for a model from elsewhere.
    """
    from sinkmodel.checkpoint import Recipe, find_checkpoint, read_checkpoint
    from sinkmodel.export import PROVENANCE
    from sinkmodel.files import read_json

    path = Path(name)
    if (path / PROVENANCE).is_file():
        said = read_json(path / PROVENANCE)
        if not isinstance(said, dict):
            raise UserError(f"{path / PROVENANCE} is not a JSON object; export the model again")
        return said
    if (path / "checkpoints").is_dir() or path.suffix == ".ckpt":
        recipe = Recipe.from_dict(read_checkpoint(find_checkpoint(path))["recipe"])
        return {"step": recipe.step, "tokens": recipe.tokens, **recipe.provenance}
    return {}


def not_twins(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """In which ways two provenances are not those of twins, in words."""
    asked = {
        "other training data": lambda said: said["data"]["fingerprint"],
        "another number of steps": lambda said: said["step"],
        "another seed": lambda said: said["config"]["seed"],
    }
    told = []
    for what, ask in asked.items():
        try:
            if ask(one) != ask(other):
                told.append(what)
        except (KeyError, TypeError):  # one of them does not say
            continue
    return told


def trained_on(provenance: dict[str, Any], documents: Sequence[Sequence[int]]) -> list[bool] | None:
    """For each document, token ids without sinks, whether a training document of the model begins as it does.

    None where that cannot be told: the prepared folder is not where it was or holds other data by its fingerprint, or
    its shards do not say where documents begin.
    """
    import numpy as np

    try:
        folder = Path(provenance["config"]["data"]["path"])
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["fingerprint"] != provenance["data"]["fingerprint"]:
            return None
        split = manifest["splits"]["train"]
        shards = [(folder / shard["file"]) for shard in split["shards"]]
        dtype = np.dtype(split["dtype"]).newbyteorder("<")
        heads = [tuple(ids[:HEAD]) for ids in documents]
        found: set[tuple[int, ...]] = set()
        for shard in shards:
            starts = np.load(shard.with_suffix(".offsets.npy"), mmap_mode="r")
            found.update(_beginnings(np.memmap(shard, dtype, mode="r"), starts, heads))
    except (KeyError, TypeError, OSError, ValueError):
        return None
    return [head in found for head in heads]


def _beginnings(ids: Any, starts: Any, heads: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Those of `heads` that stand at one of `starts` in a shard, read token by token for all starts together."""
    import numpy as np

    for length in sorted({len(head) for head in heads}):
        wanted = np.array([head for head in heads if len(head) == length])
        for first in range(0, len(starts), AT_ONCE):
            left = np.asarray(starts[first : first + AT_ONCE]).astype(np.int64)
            left = left[left + length <= len(ids)]
            for place in range(length):
                left = left[np.isin(ids[left + place], wanted[:, place])]
            for start in left:
                yield tuple(ids[start : start + length].tolist())
