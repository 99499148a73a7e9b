"""The files of a model folder that are pushed to the Hub: all of its files, and a card (`recipes.card`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

from recipes.hub.plan import Plan
from recipes.hub.repository import Repository
from sinkmodel.bounds import files_of
from sinkmodel.errors import UserError, shell
from sinkmodel.files import read_json


@dataclass(frozen=True)
class CardInput:
    """Inputs of a model card besides the model folder: see recipes.card.card.make_card."""

    run: Path | None = None
    report: Path | None = None
    results: tuple[Path, ...] = ()


def plan_of(
    repository: Repository,
    folder: Path,
    branch: str,
    card: CardInput | None,
    beside: Mapping[str, bytes] = MappingProxyType({}),
    seen: bool = True,
) -> Plan:
    """The plan that makes a branch hold a model folder, its card unless `card` is None, and the files in `beside`.

    Args:
        beside: contents of more files, by path in the repository.
        seen: whether the repository can be read; if not, the plan is made as if it were new.
    """
    files: dict[str, Path | bytes] = {**model_files(folder), **beside}
    if card is not None:
        files |= card_files(folder, repository.name, card, repository.text("README.md", branch) if seen else None)
    return repository.plan(files, branch if seen else None)


def model_files(folder: Path) -> dict[str, Path]:
    """The files of a model folder by their path in the repository, without hidden ones.

    Raises UserError if the folder has no config.json or no weights as safetensors, and for a link that leads out of it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that sink-export wrote")
    if (folder / "checkpoints").is_dir() and not (folder / "config.json").exists():
        raise UserError(f"{folder} is a run, not a model folder; push it with {shell('--run', folder)}")
    files = files_of(folder)
    for name in ("config.json", "*.safetensors"):
        if not any(fnmatch(path, name) for path in files):
            raise UserError(f"{folder} is not a model folder: it has no {name}; give one that sink-export wrote")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{folder / 'config.json'} names no model_type; give a folder that sink-export wrote")
    return files


def card_files(folder: Path, repository: str, inputs: CardInput, previous: str | None) -> dict[str, bytes]:
    """README.md and its figures, by path. The folder, which may have a README.md of its own, is not changed.

    Args:
        previous: the card that is on the Hub now, or None.
    """
    from recipes.card.card import make_card

    card = make_card(
        folder, repository=repository, run=inputs.run, report=inputs.report, results=inputs.results, previous=previous
    )
    with TemporaryDirectory() as output:
        card.write(Path(output))
        paths = [path for path in Path(output).rglob("*") if path.is_file()]
        return {path.relative_to(output).as_posix(): path.read_bytes() for path in paths}
