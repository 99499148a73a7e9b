"""A model and its training as rows of two tables. Facts that are not known have no row: nothing is guessed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from recipes.card.facts import Facts, Point
from sinkmodel.sink_metric import COLUMNS, OLD_COLUMNS

Describe = Callable[[dict[str, Any]], str]


def model_rows(facts: Facts) -> list[tuple[str, str]]:
    return known(MODEL, facts.config | {"facts": facts})


def training_rows(facts: Facts) -> list[tuple[str, str]]:
    """Rows from the checkpoint's record of its training, then rows from the run's metrics.csv."""
    points = facts.points
    measured = {
        "seconds": training_seconds(points),
        **{name: last_of(points, name) for name in ("twin_loss", "val_loss", *COLUMNS)},
    }
    if measured["sink_alpha"] is None:  # a run of an earlier version, which was not resumed by this one
        measured |= {name: last_of(points, name) for name in OLD_COLUMNS}
    return known(TRAINING, facts.training) + known(MEASURED, measured)


def citation(training: dict[str, Any], what: str = "trained this model") -> str:
    """The recipe that did `what`, with its version and commit, if they are known."""
    parts = known(
        [("", lambda t: f"version {_version(t['versions']['sinkmodel'])}"), ("", lambda t: f"commit {commit_of(t)}")],
        training,
    )
    return ", ".join([f"The recipe that {what}", *(text for _, text in parts)])


def known(rows: Iterable[tuple[str, Describe]], record: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of each row whose text can be made from the record."""
    found = []
    for name, describe in rows:
        try:
            found.append((name, describe(record)))
        except (LookupError, TypeError, ValueError, AttributeError):
            continue
    return found


def last_of(points: Iterable[Point], column: str) -> float | None:
    values = [point[column] for point in points if point.get(column) is not None]
    return values[-1] if values else None


def training_seconds(points: Iterable[Point]) -> float | None:
    """Seconds spent in optimiser steps, from tokens and tokens per second; None if no line has them.

    Time between steps (validation, saving) and time lost by a kill are not included.
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
    """The value. Raises ValueError for None or `auto`: then the value that was used is not recorded."""
    if value in (None, "auto"):
        raise ValueError(value)
    return value


def _tokens(training: dict[str, Any]) -> str:
    tokens = training["tokens"]
    times = known([("", lambda data: f", {tokens / data['train_tokens']:.2f} × the text")], training.get("data", {}))
    return f"{tokens:,}" + "".join(text for _, text in times)


def _steps(training: dict[str, Any]) -> str:
    planned = known([("", lambda config: f" of {config['schedule']['steps']:,}")], training.get("config", {}))
    return f"{training['step']:,}" + "".join(text for _, text in planned)


def _optimizer(training: dict[str, Any]) -> str:
    adamw = training["config"]["optimizer"]
    first, second = adamw["betas"]
    clip = f", gradients clipped to norm {adamw['clip']:g}" if adamw["clip"] else ""
    return f"AdamW, betas {first:g} and {second:g}, eps {adamw['eps']:g}, weight decay {adamw['weight_decay']:g}{clip}"


def _schedule(training: dict[str, Any]) -> str:
    schedule, peak = training["config"]["schedule"], training["config"]["optimizer"]["lr"]
    shape = {
        "cosine": "then half a cosine",
        "wsd": f"then constant, and falling over the last {100 * schedule.get('decay', 0):g} % of the steps",
    }[schedule["kind"]]
    rise = f"to {peak:g} over the first {100 * schedule['warmup']:g} % of the steps"
    return f"{rise}, {shape}, never below {schedule['min_lr']:g}"


def _precision(training: dict[str, Any]) -> str:
    names = {"bf16": "bf16 autocast, weights and moments in fp32", "fp32": "fp32"}
    return names[training["config"]["training"]["precision"]]


def _hardware(training: dict[str, Any]) -> str:
    count = training["processes"]
    nodes = training.get("nodes", 1)
    where = f" on {nodes} nodes" if nodes > 1 else ""
    return f"{_settled(training['hardware'])}, {count} process{'es' if count > 1 else ''}{where}"


def _version(version: Any) -> str:
    """Raises ValueError for anything but a version: the text goes into BibTeX, where many characters are special."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+!-]{,63}", str(version)):
        raise ValueError(version)
    return str(version)


def commit_of(training: dict[str, Any]) -> str:
    """Raises ValueError for anything but a git commit id, with a + after it if files were changed."""
    commit = str(_settled(training["git_commit"]))
    if not re.fullmatch(r"[0-9a-f]{7,64}\+?", commit):
        raise ValueError(commit)
    return commit.rstrip("+") + (", with changes" if commit.endswith("+") else "")


MODEL: list[tuple[str, Describe]] = [
    ("architecture", _architecture),
    ("parameters", lambda c: f"{c['facts'].parameters:,}; {c['facts'].without_embeddings:,} without embeddings"),
    ("layers", lambda c: f"{c['num_hidden_layers']}"),
    ("width", lambda c: f"{c['hidden_size']}, feed-forward {c['intermediate_size']:,}"),
    ("heads", _heads),
    ("trained positions", lambda c: f"{c['max_position_embeddings']:,}"),
    ("rows of the vocabulary", lambda c: f"{c['vocab_size']:,}"),
    ("type of the weights", lambda c: c["facts"].dtype),
]
TRAINING: list[tuple[str, Describe]] = [
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
MEASURED: list[tuple[str, Describe]] = [
    ("time in training steps", lambda m: duration(m["seconds"])),
    ("training loss at the end", lambda m: f"{m['twin_loss']:.4f} nats per token"),
    ("held-out loss at the end", lambda m: f"{m['val_loss']:.4f} nats per token"),
    *((label, lambda m, name=name: f"{m[name]:.3f}") for name, label in {**COLUMNS, **OLD_COLUMNS}.items()),
]
