"""The card of a NAMM, an evolved memory: what it is, what it was evolved on, how to load it, what was measured.

    card = make_namm_card(Path("runs/namm/best"), repository="org/namm", results=[Path("memories.json")])
    card.write(Path("runs/namm/best"))

It has what `config.json` of the artefact states, and no guess. No torch here, as for every card.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sinkmodel
from recipes.card.card import README, Card, fill, kept_of
from recipes.card.facts import HUB_NAME, count_parameters
from recipes.card.metadata import CHOICES, UNKNOWN
from recipes.card.report import Report, read_report
from recipes.card.results import NAMM_READERS, read_results
from recipes.card.rows import Describe, citation, commit_of, known
from sinkmodel.files import read_json
from sinkmodel.secrets import all_redacted

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from recipes.card.results import Measured

# As sinkmodel.memories.namm.config calls them, which would bring torch.
FORMAT, CONFIG, WEIGHTS = "sinkmodel-namm", "config.json", "namm.safetensors"
SHIPPED = Path(sinkmodel.__file__).parent / "memories" / "namm" / "evolved"
TAGS = ("kv-cache", "namm", "attention-memory", "evolution")


def is_namm(folder: Path) -> bool:
    """Whether the folder is the artefact of a NAMM, by the format that its config.json names."""
    path = folder / CONFIG
    content = read_json(path) if path.is_file() else None
    return isinstance(content, dict) and content.get("format") == FORMAT


def make_namm_card(
    folder: Path,
    *,
    repository: str,
    report: Path | None = None,
    results: Sequence[Path] = (),
    previous: str | None = None,
) -> Card:
    """The card of an artefact; the arguments are those of `recipes.card.card.make_card`.

    Of `results` it takes the rows of `sink-eval memories` and `longcontext` that were measured with this artefact.
    """
    config = all_redacted(read_json(folder / CONFIG))
    shown = Report() if report is None else read_report(report)
    measured = read_results(results, own_names(folder, repository), NAMM_READERS)
    old, by_hand = kept_of(folder / README, previous)
    stated = config.get("evolved_on")
    evolved_on: dict[str, Any] = stated if isinstance(stated, dict) else {}
    about = {**evolved_on, "selected_by": evolved_on.get("fitness"), "git_commit": config.get("commit"), **config}
    host = dict(known([("name", lambda r: str(r["host"]["name"]))], about)).get("name")
    parameters = count_parameters(folder)[0]
    text = fill(
        "namm.md.jinja",
        metadata(repository, host, measured, old),
        by_hand,
        name=repository.rpartition("/")[2],
        repository=repository,
        host=host,
        hub_host=host if _is_hub_name(host) else None,
        interval=config.get("interval"),
        parameters=parameters,
        network=known(NETWORK, {**config, "parameters": parameters}),
        evolution=known(EVOLUTION, about),
        reached=dict(known(REACHED, about)),
        measured=measured,
        sections=shown.sections,
        citation=citation(about, "evolved this memory"),
    )
    return Card(text, shown)


def own_names(folder: Path, repository: str) -> Callable[[str], bool]:
    """Whether a name in a result means this artefact: its repository, or a folder or shipped artefact with its weights.

    A folder is preferred to an artefact of the same name that ships, as in `sinkmodel.memories.namm.config`.
    """
    weights = (folder / WEIGHTS).read_bytes()

    def own(name: str) -> bool:
        copy = (Path(name) if Path(name).is_dir() else SHIPPED / name) / WEIGHTS
        return name == repository or (copy.is_file() and copy.read_bytes() == weights)

    return own


def metadata(repository: str, host: str | None, measured: Sequence[Measured], old: dict[str, Any]) -> ModelCardData:
    """The card's metadata; of `old`, the one before, all that is not known here is kept."""
    from huggingface_hub import ModelCardData

    found: dict[str, Any] = {"license": UNKNOWN, "library_name": "sinkmodel"}
    if _is_hub_name(host):
        found |= {"base_model": host, "base_model_relation": "adapter"}
    kept = {key: value for key, value in old.items() if key not in ("model-index", "tags", "model_name")}
    merged = {**kept, **found, **{key: kept[key] for key in CHOICES if kept.get(key)}}
    more = old.get("tags")
    merged["tags"] = [*TAGS, *(tag for tag in (more if isinstance(more, list) else []) if tag not in TAGS)]
    results = [one.in_index() for one in measured] or None
    name = repository.rpartition("/")[2]
    return ModelCardData(**merged, eval_results=results, model_name=name if results else None)


def _is_hub_name(name: str | None) -> bool:
    return isinstance(name, str) and HUB_NAME.fullmatch(name) is not None


# ------------------------------------------------------------------------------------------------------------- each row


def _tasks(record: dict[str, Any]) -> str:
    tasks = record["tasks"]
    begin = tasks.get("begin") or [0] * len(tasks["names"])
    return ", ".join(
        f"{name} (from generation {first})" if first else name for name, first in zip(tasks["names"], begin)
    )


def _fitness(record: dict[str, Any]) -> str:
    penalty = (record.get("selected_by") or {}).get("size_penalty") or 0
    return f"{record['fitness']:.4f}; the full cache has {1 - penalty:g}"


def _selected_by(record: dict[str, Any]) -> str:
    settings = record["selected_by"]
    score = {"likelihood": "the likelihood of the answer, exp(−nats per token)", "match": "the task's metric"}
    penalty = settings.get("size_penalty") or 0
    less = f", less {penalty:g} × the share that is kept" if penalty else ""
    return f"{score[settings['score']]}, divided by the full cache's on the same prompts{less}"


def _texts(record: dict[str, Any]) -> str:
    files = {name: digest for of_option in record["texts"].values() for name, digest in of_option.items()}
    if not files:
        raise ValueError
    return ", ".join(f"{name} (SHA-256 {digest[:16]})" for name, digest in files.items())


def _optimizer(record: dict[str, Any]) -> str:
    cma = record["cma"]
    return f"CMA-ES, {cma['kind']}, {cma['population']} candidates, σ₀ {cma['sigma']:g}; the result is their mean"


NETWORK: list[tuple[str, Describe]] = [
    ("parameters", lambda c: f"{c['parameters']:,}, one set for all layers and heads"),
    ("decides every", lambda c: f"{c['interval']:,} tokens"),
    ("spectrogram", lambda c: f"frames of {c['window']} tokens, one every {c['hop']}; {c['window'] // 2 + 1} bins"),
    ("decay of old frames", lambda c: f"γ = {c['gamma']:g} a token"),
    ("code of a token's age", lambda c: f"{c['age_size']} numbers, base {c['age_base']:,g}"),
    ("hidden size", lambda c: f"{c['hidden']}"),
    ("checksum of the statistics", lambda c: f"{c['statistics_sha256'][:16]}"),
]
HOST: list[tuple[str, Describe]] = [
    ("", lambda host: f"{host['name']}"),
    ("", lambda host: f"({host['type']}, {host['parameters']:,} parameters)"),
]
EVOLUTION: list[tuple[str, Describe]] = [
    ("base model", lambda r: " ".join(text for _, text in known(HOST, r["host"])) or _unknown()),
    ("fingerprint of its weights", lambda r: f"{r['host']['fingerprint']}"),
    ("tasks", _tasks),
    (
        "prompts",
        lambda r: f"{r['tasks']['prompts']} of each task in a generation, {r['tasks']['length']:,} tokens each",
    ),
    ("texts", _texts),
    ("fitness", _selected_by),
    ("optimiser", _optimizer),
    ("generation", lambda r: f"{r['generation']:,}"),
    ("fitness on validation prompts", _fitness),
    ("kept of their cache", lambda r: f"{100 * r['kept']:.1f} %"),
    ("seeds", lambda r: ", ".join(map(str, r["seeds"])) or _unknown()),
    ("made with", lambda r: ", ".join(f"{name} {text}" for name, text in r["versions"].items())),
    ("commit of the recipe", commit_of),
]
REACHED: list[tuple[str, Describe]] = [
    ("fitness", lambda r: f"{r['fitness']:.3f}"),
    ("kept", lambda r: f"{100 * r['kept']:.0f} %"),
]


def _unknown() -> str:
    """Raises ValueError: the row has nothing to state, and is left out."""
    raise ValueError
