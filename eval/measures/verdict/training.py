"""Checks on how models were trained: whether they were trained on the test text, and whether runs are really twins."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sinkmodel.bases import weights_fingerprint
from sinkmodel.bounds import held, real
from sinkmodel.errors import UserError
from sinkmodel.files import sha256_of
from sinkmodel.fingerprint import fingerprint_of
from sinkmodel.loading import LoadedModel
from sinkmodel.progress import CountedProgress
from sinkmodel.provenance import read_provenance
from sinkmodel.results.parts import Text

Provenance = dict[str, Any]  # the provenance of a model, as `training_of` returns it
HEAD = 64  # documents are compared by this many first tokens
AT_ONCE = 1 << 20  # training documents compared together
SIZES = {
    "model type": "model_type",
    "layers": "num_hidden_layers",
    "hidden size": "hidden_size",
    "heads": "num_attention_heads",
    "KV heads": "num_key_value_heads",
    "feed-forward size": "intermediate_size",
    "positions": "max_position_embeddings",
}


def training_of(loaded: LoadedModel) -> Provenance:
    """The model's `name`, its `shape`, a fingerprint of its `weights` (only in fp32), and its provenance, if any."""
    in_full = loaded.model.dtype == torch.float32
    weights = {"weights": weights_fingerprint(loaded.model)} if in_full else {}
    shape = shape_of(loaded.model.config)
    return {**read_provenance(loaded.name), "name": loaded.name, "shape": shape, **weights}


def shape_of(config: Any) -> dict[str, Any]:
    """The values of SIZES in a transformers config, by name; None if it lacks the key, such as GPT-NeoX's KV heads.

    A model with a sink in the softmax has the same shape as its twin, although its model type differs: `sink_gpt_neox`.
    """
    config = config.get_text_config()
    shape = {size: getattr(config, key, None) for size, key in SIZES.items()}
    return {**shape, "model type": config.model_type.removeprefix("sink_")}


def not_twins(one: Provenance, other: Provenance) -> list[str]:
    """The ways in which two models are not twins, as phrases. The first may have been trained from the second."""
    if one.get("parts", "all") != "all":
        same = _is_base(one, other)
        if same is None:
            return [f"as --dtype is not float32, it is not checked that the second is {one['base']['name']}, the base"]
        return [] if same else [f"the first has a trained sink on another base, {one['base']['name']}"]
    ways = _trained_unlike(one, other)
    if _is_base(one, other):
        ways.append("the second is the base that the first was trained further from")
    seeds = _seed(one), _seed(other)
    return ways if None in seeds or seeds[0] == seeds[1] else [*ways, "another seed"]


def _is_base(one: Provenance, other: Provenance) -> bool | None:
    """Whether the first was trained from the second; None if unknown: no fp32 weights, and another name or step."""
    base = one.get("base")
    if not isinstance(base, dict):
        return False
    if "weights" in other:
        return other["weights"] == base["fingerprint"]
    same_name = base["name"] in (other["name"], str(Path(other["name"]).absolute()))
    return True if same_name and base["step"] in (None, other.get("step")) else None


def not_seeds(runs: dict[str, Provenance]) -> list[str]:
    """Warnings if runs are not one model trained with several seeds."""
    warnings = []
    first = next(iter(runs))
    by_seed: dict[int, str] = {}
    for name, provenance in runs.items():
        if ways := _trained_unlike(runs[first], provenance):
            warnings.append(f"{first} and {name} differ by more than their seeds: {', '.join(ways)}")
        seed = _seed(provenance)
        if seed is not None and (other := by_seed.setdefault(seed, name)) != name:
            warnings.append(f"{other} and {name} have the same seed, {seed}: they do not represent other seeds")
    return warnings


def _seed(provenance: Provenance) -> int | None:
    """The seed of the training; None if it is unknown."""
    try:
        seed = provenance["config"]["seed"]
    except (KeyError, TypeError):
        return None
    return seed if isinstance(seed, int) else None


def _trained_unlike(one: Provenance, other: Provenance) -> list[str]:
    """The ways in which two models were trained differently, as phrases; what either provenance lacks is ignored."""
    checks = {
        "other training data": lambda provenance: provenance["data"]["fingerprint"],
        "another number of steps": lambda provenance: provenance["step"],
        "another model to start from": lambda provenance: provenance["base"]["fingerprint"],
        "other parts trained": lambda provenance: provenance["parts"],
    }
    ways = []
    for way, value_of in checks.items():
        try:
            if value_of(one) != value_of(other):
                ways.append(way)
        except (KeyError, TypeError):  # one of them does not have the value
            continue
    pairs = [(size, one["shape"][size], other["shape"][size]) for size in SIZES]
    return ways + [f"{size} {a} and {b}" for size, a, b in pairs if None not in (a, b) and a != b]


def in_training(models: dict[str, Provenance], texts: Sequence[Text], documents: Sequence[Sequence[int]]) -> list[str]:
    """Warnings if a model was trained on the test text, or if that cannot be checked.

    `texts` and `documents` are what `read_texts` returns, the documents without sinks.
    """
    warnings = []
    for name, provenance in models.items():
        if not provenance.get("data"):
            continue
        known = trained_on(provenance, documents)
        if known is None:
            warnings.append(f"{name}: its training data is not where it was, so it is unknown whether --text is in it")
            continue
        first = 0
        for text in texts:
            used = text.documents or 0
            count = sum(known[first : first + used])
            first += used
            if count:
                warnings.append(
                    f"{name} was trained on {text.file}: {count} of {used} documents begin like "
                    "training documents; give held-out text"
                )
    return warnings


def trained_on(provenance: dict[str, Any], documents: Sequence[Sequence[int]]) -> list[bool] | None:
    """For each document (token ids without sinks), whether a training document of the model begins with its tokens.

    Returns None if this cannot be checked: the prepared folder has moved, the checksums of its shards show other data,
    or its shards do not record the beginnings of documents.
    """
    try:
        folder = Path(provenance["config"]["data"]["path"])
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        split = manifest["splits"]["train"]
        prints = {manifest["fingerprint"], fingerprint_of(manifest["tokenizer"]["sha256"], manifest["splits"])}
        if prints != {provenance["data"]["fingerprint"]}:
            return None
        shards = {held(folder, shard["file"], folder / "manifest.json"): shard for shard in split["shards"]}
        offsets = {file: real(folder, file.with_suffix(".offsets.npy")) for file in shards}
        beginnings = {file: np.load(path, mmap_mode="r") for file, path in offsets.items()}
        with CountedProgress(f"checking {folder}", "tokens", split["tokens"]) as progress:
            for file, shard in shards.items():
                if _sha256(file, file.stat().st_size, file.stat().st_mtime_ns) != shard["sha256"]:
                    return None
                progress.add(shard["tokens"])
        dtype = np.dtype(split["dtype"]).newbyteorder("<")
        heads = [tuple(ids[:HEAD]) for ids in documents]
        found: set[tuple[int, ...]] = set()
        for file, starts in beginnings.items():
            found.update(_beginnings(np.memmap(file, dtype, mode="r"), starts, heads))
    except (
        LookupError,
        AttributeError,
        TypeError,
        OSError,
        ValueError,
        EOFError,
        UserError,
    ):
        return None
    return [head in found for head in heads]


@functools.cache
def _sha256(file: Path, size: int, changed: int) -> str:
    """Cached, since several models may be trained on one folder; `size` and `changed` detect that the file changed."""
    return sha256_of(file)


def _beginnings(ids: Any, starts: Any, heads: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    """Yield those of `heads` that occur at one of `starts` in a shard; compares one token at a time, for all starts."""
    for length in sorted({len(head) for head in heads}):
        wanted = np.array([head for head in heads if len(head) == length])
        for first in range(0, len(starts), AT_ONCE):
            left = np.asarray(starts[first : first + AT_ONCE]).astype(np.int64)
            left = left[left + length <= len(ids)]
            for place in range(length):
                left = left[np.isin(ids[left + place], wanted[:, place])]
            for start in left:
                yield tuple(ids[start : start + length].tolist())
