"""What the Hub reads of a card: the YAML on top of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from recipes.card.facts import Facts, Start
from recipes.card.results import Measured
from sinkmodel.markdown import one_line

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

LICENCE = "apache-2.0"  # of the recipe; another one in the card's metadata stays
UNKNOWN = "unknown"  # the Hub's word for a licence that nobody stated
ENGLISH = ("kjv", "emozilla/pg19", "HuggingFaceFW/fineweb-edu", "EleutherAI/the_pile_deduplicated")  # of configs/data
CHOICES = ("license", "language")  # somebody's to make: what stands there already wins
DATASET = re.compile(r"([\w.-]+/[\w.-]+)@[0-9a-f]+( |$)")  # a data set of the Hub, as sink-prepare names it


def metadata(facts: Facts, measured: Sequence[Measured], old: dict[str, Any]) -> ModelCardData:
    """The card's metadata; of `old`, the one before, all that is not told by the facts is kept."""
    from huggingface_hub import ModelCardData

    base = facts.base.hub_name if facts.base else None
    told = {
        **licence_of(facts.base),
        "language": ["en"] if (facts.source or "").partition(" ")[0].partition("@")[0] in ENGLISH else None,
        # Plain transformers refuses a sink in the softmax, so the Hub should not show how to load it so.
        "library_name": "sinkmodel" if facts.in_softmax else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base,
        "base_model_relation": "finetune" if base else None,
        "datasets": [found[1]] if (found := DATASET.match(facts.source or "")) else None,
        "tags": tags(facts),
    }
    kept = {key: value for key, value in old.items() if key not in ("model-index", "tags", "model_name")}
    merged = {**kept, **{key: value for key, value in told.items() if value is not None}}
    merged |= {key: kept[key] for key in CHOICES if kept.get(key)}
    if kept.get("license") and "license_name" not in kept:
        merged.pop("license_name", None)
    more = old.get("tags")
    merged["tags"] += [tag for tag in (more if isinstance(more, list) else []) if tag not in merged["tags"]]
    results = [one.in_index() for one in measured] or None
    in_order = {key: merged.pop(key) for key in told if key in merged}
    return ModelCardData(**in_order, **merged, eval_results=results, model_name=facts.name if results else None)


def licence_of(base: Start | None) -> dict[str, str]:
    """The licence of the base is passed on; one that is not among the Hub's short names is named in full."""
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
