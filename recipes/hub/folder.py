"""The files of a model folder or a NAMM that are pushed to the Hub: all of its files, and a card (`recipes.card`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from recipes.card.namm import WEIGHTS, is_namm
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

    Raises UserError if a model would replace a NAMM, or a NAMM a model.
    """
    files: dict[str, Path | bytes] = {**model_files(folder), **beside}
    if card is not None:
        files |= card_files(folder, repository.name, card, repository.text("README.md", branch) if seen else None)
    plan = repository.plan(files, branch if seen else None)
    _refuse_another_kind(repository, plan)
    return plan


def model_files(folder: Path) -> dict[str, Path]:
    """The files of a model folder or an artefact by their path in the repository, without hidden ones.

    Raises UserError if the folder has no config.json or no weights as safetensors, for a link that leads out of it, and
    for an artefact that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that sink-export or sink-evolve wrote")
    refuse_evolution(folder)
    if (folder / "checkpoints").is_dir() and not (folder / "config.json").exists():
        raise UserError(f"{folder} is a run, not a model folder; push it with {shell('--run', folder)}")
    files = files_of(folder)
    if is_namm(folder):
        from sinkmodel.memories.namm import read_artefact  # it brings torch, which a model folder does without

        read_artefact(folder)
        return files
    for name in ("config.json", "*.safetensors"):
        if not any(fnmatch(path, name) for path in files):
            raise UserError(f"{folder} is not a model folder: it has no {name}; give one that sink-export wrote")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{folder / 'config.json'} names no model_type; give a folder that sink-export wrote")
    return files


def refuse_evolution(folder: Path) -> None:
    """UserError if the folder is a run of sink-evolve, whose results are folders in it."""
    if (folder / "best" / WEIGHTS).is_file():
        result = shell("--model", folder / "best")
        raise UserError(f"{folder} is a run of sink-evolve, not a model folder; push its result with {result}")


def _refuse_another_kind(repository: Repository, plan: Plan) -> None:
    mine, theirs = _kind({one.path_in_repo for one in plan.wanted}), _kind(plan.head.files)
    if None not in (mine, theirs) and mine != theirs:
        raise UserError(f"{repository.name} holds {theirs}, and this is {mine}; give another --repo, one for each")


def _kind(paths: Collection[str]) -> str | None:
    if any(fnmatch(path, "model*.safetensors") for path in paths):
        return "a model"
    return "a NAMM" if WEIGHTS in paths else None


def card_files(folder: Path, repository: str, inputs: CardInput, previous: str | None) -> dict[str, bytes]:
    """README.md and its figures, by path. The folder, which may have a README.md of its own, is not changed.

    Args:
        previous: the card that is on the Hub now, or None.
    """
    from recipes.card.card import make_card
    from recipes.card.namm import make_namm_card

    given: dict[str, Any] = {"report": inputs.report, "results": inputs.results, "previous": previous}
    if is_namm(folder):
        card = make_namm_card(folder, repository=repository, **given)
    else:
        card = make_card(folder, repository=repository, run=inputs.run, **given)
    with TemporaryDirectory() as output:
        card.write(Path(output))
        paths = [path for path in Path(output).rglob("*") if path.is_file()]
        return {path.relative_to(output).as_posix(): path.read_bytes() for path in paths}
