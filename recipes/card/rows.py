"""A model and its training as rows of two tables. What is not known has no row: nothing is guessed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from recipes.card.facts import Facts, Point

Told = Callable[[dict[str, Any]], str]


def model_rows(facts: Facts) -> list[tuple[str, str]]:
    return known(MODEL, facts.config | {"facts": facts})


def training_rows(facts: Facts) -> list[tuple[str, str]]:
    """What the checkpoint says of its training, then what the run's metrics.csv says of how it went."""
    points = facts.points
    measured = {
        "seconds": training_seconds(points),
        **{name: last_of(points, name) for name in ("twin_loss", "val_loss", "sink_share", "sink_heads")},
    }
    return known(TRAINING, facts.training) + known(MEASURED, measured)


def citation(training: dict[str, Any], what: str = "trained this model") -> str:
    """The recipe's version and commit, as far as they are known; `what` it did."""
    said = known(
        [("", lambda t: f"version {_version(t['versions']['sinkmodel'])}"), ("", lambda t: f"commit {commit_of(t)}")],
        training,
    )
    return ", ".join([f"The recipe that {what}", *(text for _, text in said)])


def known(rows: Iterable[tuple[str, Told]], record: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, what is said) of each row that the record has an answer to."""
    told = []
    for name, tell in rows:
        try:
            told.append((name, tell(record)))
        except (LookupError, TypeError, ValueError, AttributeError):
            continue
    return told


def last_of(points: Iterable[Point], column: str) -> float | None:
    values = [point[column] for point in points if point.get(column) is not None]
    return values[-1] if values else None


def training_seconds(points: Iterable[Point]) -> float | None:
    """Seconds of the optimiser steps in the lines, from tokens and tokens per second; None where no line tells.

    What was done between steps (validation, saving) and what a kill cost is not among them.
    """
    seconds, before = 0.0, 0.0
    for point in points:
        tokens, speed = point.get("tokens"), point.get("tokens_per_second")
        if tokens is not None and speed:
            seconds, before = seconds + (tokens - before) / speed, tokens
    return seconds or None


def duration(seconds: float) -> str:
    """`3.4 hours`, `12 minutes`, `45 seconds`."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"{seconds:.0f} seconds"


# ------------------------------------------------------------------------------------------------------------- each row


def _architecture(config: dict[str, Any]) -> str:
    names = {"gpt_neox": "GPT-NeoX (Pythia)", "llama": "Llama"}
    kind = config["model_type"]
    in_softmax = kind.startswith("sink_")
    name = kind.removeprefix("sink_")
    return names.get(name, name) + (f", with a sink in its softmax ({kind})" if in_softmax else "")


def _heads(config: dict[str, Any]) -> str:
    heads, groups = config["num_attention_heads"], config.get("num_key_value_heads")
    return f"{heads}" if groups in (None, heads) else f"{heads}, which share {groups} of keys and values"


def _settled(value: Any) -> Any:
    """Raises ValueError for what was left to be decided, and is not recorded."""
    if value in (None, "auto"):
        raise ValueError(value)
    return value


def _tokens(training: dict[str, Any]) -> str:
    tokens = training["tokens"]
    times = known([("", lambda data: f", {tokens / data['train_tokens']:.2f} × the text")], training.get("data", {}))
    return f"{tokens:,}" + "".join(said for _, said in times)


def _steps(training: dict[str, Any]) -> str:
    planned = known([("", lambda config: f" of {config['schedule']['steps']:,}")], training.get("config", {}))
    return f"{training['step']:,}" + "".join(said for _, said in planned)


def _optimizer(training: dict[str, Any]) -> str:
    said = training["config"]["optimizer"]
    first, second = said["betas"]
    clip = f", gradients clipped to norm {said['clip']:g}" if said["clip"] else ""
    return f"AdamW, betas {first:g} and {second:g}, eps {said['eps']:g}, weight decay {said['weight_decay']:g}{clip}"


def _schedule(training: dict[str, Any]) -> str:
    said, peak = training["config"]["schedule"], training["config"]["optimizer"]["lr"]
    shape = {
        "cosine": "then half a cosine",
        "wsd": f"then constant, and falling over the last {100 * said.get('decay', 0):g} % of the steps",
    }[said["kind"]]
    return (
        f"to {peak:g} over the first {100 * said['warmup']:g} % of the steps, {shape}, never below {said['min_lr']:g}"
    )


def _precision(training: dict[str, Any]) -> str:
    said = {"bf16": "bf16 autocast, weights and moments in fp32", "fp32": "fp32"}
    return said[training["config"]["training"]["precision"]]


def _hardware(training: dict[str, Any]) -> str:
    count = training["processes"]
    nodes = training.get("nodes", 1)
    where = f" on {nodes} nodes" if nodes > 1 else ""
    return f"{_settled(training['hardware'])}, {count} process{'es' if count > 1 else ''}{where}"


def _version(said: Any) -> str:
    """Raises ValueError for what is none: it may end up in BibTeX, where hardly a sign means itself."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+!-]{,63}", str(said)):
        raise ValueError(said)
    return str(said)


def commit_of(training: dict[str, Any]) -> str:
    """Raises ValueError for what is not a commit's id, as git writes it, with a + for changes."""
    said = str(_settled(training["git_commit"]))
    if not re.fullmatch(r"[0-9a-f]{7,64}\+?", said):
        raise ValueError(said)
    return said.rstrip("+") + (", with changes" if said.endswith("+") else "")


MODEL: list[tuple[str, Told]] = [
    ("architecture", _architecture),
    ("parameters", lambda c: f"{c['facts'].parameters:,}; {c['facts'].without_embeddings:,} without embeddings"),
    ("layers", lambda c: f"{c['num_hidden_layers']}"),
    ("width", lambda c: f"{c['hidden_size']}, feed-forward {c['intermediate_size']:,}"),
    ("heads", _heads),
    ("trained positions", lambda c: f"{c['max_position_embeddings']:,}"),
    ("rows of the vocabulary", lambda c: f"{c['vocab_size']:,}"),
    ("type of the weights", lambda c: c["facts"].dtype),
]
TRAINING: list[tuple[str, Told]] = [
    ("text", lambda t: str(_settled(t["data"]["source"]))),
    ("tokens of that text", lambda t: f"{t['data']['train_tokens']:,}"),
    ("fingerprint of data and tokenizer", lambda t: f"{_settled(t['data']['fingerprint'])}"),
    ("tokens trained on", _tokens),
    ("steps", _steps),
    (
        "batch",
        lambda t: f"{t['config']['training']['batch_tokens']:,} tokens, in rows of {t['config']['data']['sequence']:,}",
    ),
    ("optimiser", _optimizer),
    ("learning rate", _schedule),
    ("precision", _precision),
    ("hardware", _hardware),
    ("seed", lambda t: f"{_settled(t['config']['seed'])}"),
    ("made with", lambda t: ", ".join(f"{name} {_version(version)}" for name, version in t["versions"].items())),
    ("commit of the recipe", commit_of),
]
MEASURED: list[tuple[str, Told]] = [
    ("time in training steps", lambda m: duration(m["seconds"])),
    ("training loss at the end", lambda m: f"{m['twin_loss']:.4f} nats per token"),
    ("held-out loss at the end", lambda m: f"{m['val_loss']:.4f} nats per token"),
    ("share of attention on the first place", lambda m: f"{m['sink_share']:.3f}"),
    ("share of heads with a sink there", lambda m: f"{m['sink_heads']:.3f}"),
]
