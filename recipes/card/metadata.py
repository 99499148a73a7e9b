"""What the Hub reads of a card: the YAML on top of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from recipes.card.facts import Facts
from recipes.card.results import Measured

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

LICENCE = "apache-2.0"  # of the recipe; another one in the card's metadata stays
ENGLISH = ("kjv", "emozilla/pg19", "HuggingFaceFW/fineweb-edu", "EleutherAI/the_pile_deduplicated")  # of configs/data
CHOICES = ("license", "language")  # somebody's to make: what stands there already wins
DATASET = re.compile(r"([\w.-]+/[\w.-]+)@[0-9a-f]+( |$)")  # a data set of the Hub, as sink-prepare names it


def metadata(facts: Facts, measured: Sequence[Measured], old: dict[str, Any]) -> ModelCardData:
    """The card's metadata; of `old`, the one before, all that is not told by the facts is kept."""
    from huggingface_hub import ModelCardData

    told = {
        "license": LICENCE,
        "language": ["en"] if (facts.source or "").partition(" ")[0].partition("@")[0] in ENGLISH else None,
        # Plain transformers refuses a sink in the softmax, so the Hub should not show how to load it so.
        "library_name": "sinkmodel" if facts.in_softmax else "transformers",
        "pipeline_tag": "text-generation",
        "datasets": [found[1]] if (found := DATASET.match(facts.source or "")) else None,
        "tags": tags(facts),
    }
    kept = {key: value for key, value in old.items() if key not in ("model-index", "tags", "model_name")}
    merged = {**kept, **{key: value for key, value in told.items() if value is not None}}
    merged |= {key: kept[key] for key in CHOICES if kept.get(key)}
    more = old.get("tags")
    merged["tags"] += [tag for tag in (more if isinstance(more, list) else []) if tag not in merged["tags"]]
    results = [one.in_index() for one in measured] or None
    in_order = {key: merged.pop(key) for key in told if key in merged}
    return ModelCardData(**in_order, **merged, eval_results=results, model_name=facts.name if results else None)


def tags(facts: Facts) -> list[str]:
    kind = facts.sink.kind
    return ["attention-sink", "streaming", "kv-cache", "vanilla-twin" if kind == "none" else f"sink-{kind}"]
