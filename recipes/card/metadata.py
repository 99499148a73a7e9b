"""The card's metadata: the YAML at its top, which the Hub reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from recipes.card.facts import Facts, Start
from recipes.card.results import Measured
from sinkmodel.markdown import one_line

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

LICENCE = "apache-2.0"  # of the recipe; a different one in the card's metadata is kept
UNKNOWN = "unknown"  # the Hub's word for a licence that is not stated
ENGLISH = ("kjv", "emozilla/pg19", "HuggingFaceFW/fineweb-edu", "EleutherAI/the_pile_deduplicated")  # of configs/data
CHOICES = ("license", "language")  # the owner's choice: an existing value is kept
DATASET = re.compile(r"([\w.-]+/[\w.-]+)@[0-9a-f]+( |$)")  # a data set of the Hub, as sink-prepare names it


def metadata(facts: Facts, measured: Sequence[Measured], old: dict[str, Any]) -> ModelCardData:
    """The card's metadata. Keys of the old metadata, `old`, are kept if the facts do not set them."""
    from huggingface_hub import ModelCardData

    base = facts.base.hub_name if facts.base else None
    known = {
        **licence_of(facts.base),
        "language": ["en"] if (facts.source or "").partition(" ")[0].partition("@")[0] in ENGLISH else None,
        # Plain transformers refuses a sink in the softmax, so the Hub should not suggest it as the library.
        "library_name": "sinkmodel" if facts.in_softmax else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base,
        "base_model_relation": "finetune" if base else None,
        "datasets": [found[1]] if (found := DATASET.match(facts.source or "")) else None,
        "tags": tags(facts),
    }
    kept = {key: value for key, value in old.items() if key not in ("model-index", "tags", "model_name")}
    merged = {**kept, **{key: value for key, value in known.items() if value is not None}}
    merged |= {key: kept[key] for key in CHOICES if kept.get(key)}
    if kept.get("license") and "license_name" not in kept:
        merged.pop("license_name", None)
    more = old.get("tags")
    merged["tags"] += [tag for tag in (more if isinstance(more, list) else []) if tag not in merged["tags"]]
    results = [one.in_index() for one in measured] or None
    in_order = {key: merged.pop(key) for key in known if key in merged}
    return ModelCardData(**in_order, **merged, eval_results=results, model_name=facts.name if results else None)


def licence_of(base: Start | None) -> dict[str, str]:
    """The base's licence is passed on. One that does not look like a short name of the Hub is given in full."""
    if base is None or (base.license is None and base.step is not None):  # a run of this recipe
        return {"license": LICENCE}
    if base.license is None:
        return {"license": UNKNOWN}
    short = base.license.lower()
    if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", short):
        return {"license": short}
    return {"license": "other", "license_name": one_line(base.license)[:100]}


def tags(facts: Facts) -> list[str]:
    kind = facts.sink.kind
    return ["attention-sink", "streaming", "kv-cache", "vanilla-twin" if kind == "none" else f"sink-{kind}"]
