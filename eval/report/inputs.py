"""Reads, cleans and checks the inputs of a report: runs, results of the other commands, attention maps.

Files may come from anybody. NaN and infinity count as not measured. Control characters are replaced. A file that does
not have the form that a command writes raises a UserError that names the place.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.report.blocks import short_names
from eval.report.forms import EVERY, FORMS, clean, mismatch
from sinkmodel.errors import UserError
from sinkmodel.files import read_json, sha256_of

MAP_COLUMNS = ["layer", "head", "query", "key", "logit", "weight"]


@dataclass(frozen=True)
class Result:
    path: Path
    sha256: str
    content: dict[str, Any]

    @property
    def command(self) -> str:
        return self.content["command"]


@dataclass(frozen=True)
class Run:
    path: Path
    name: str
    points: list[dict[str, float | None]]  # lines of metrics.csv
    config: str  # config.yaml
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Maps:
    path: Path
    heads: dict[tuple[int, int], list[tuple[int, str, float | None, float | None]]]  # query, key, logit, weight


@dataclass(frozen=True)
class Inputs:
    runs: list[Run] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    maps: list[Maps] = field(default_factory=list)

    def of(self, command: str) -> list[dict[str, Any]]:
        """The contents of the files of one command, in the given order."""
        return [result.content for result in self.results if result.command == command]


def once(paths: Sequence[Path]) -> list[Path]:
    """The paths without repetitions, even if one file or folder is spelled in several ways."""
    found: dict[str, Path] = {}
    for path in paths:
        found.setdefault(os.path.realpath(path), path)
    return list(found.values())


# ------------------------------------------------------------------------------------------------------------ results


def read_result(path: Path) -> Result:
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file that a command of sink-eval wrote with --json")
    try:
        content = clean(read_json(path))
    except RecursionError:
        raise UserError(f"{path} is not a result of sink-eval --json: it is nested too deeply") from None
    command = content.get("command") if isinstance(content, dict) else None
    if not isinstance(command, str) or command not in FORMS:
        known = ", ".join(FORMS)
        raise UserError(f"{path} is not a result of sink-eval --json: its command is {command!r}, not one of {known}")
    if found := mismatch({**EVERY, **FORMS[command]}, content):
        raise UserError(f"{path} is not what sink-eval {command} --json writes: {found}; measure it again")
    if not content["rows"]:
        raise UserError(f"{path} has no rows: nothing was measured; measure it again with sink-eval {command}")
    return Result(path, sha256_of(path), content)


# --------------------------------------------------------------------------------------------------------------- runs


def read_runs(paths: Sequence[Path]) -> list[Run]:
    names = short_names(map(str, paths))
    return [_read_run(path, names[str(path)]) for path in paths]


def _read_run(path: Path, name: str) -> Run:
    from sinkmodel.checkpoint import checkpoint_steps, read_metrics
    from sinkmodel.provenance import read_provenance

    try:
        lines = read_metrics(path)
    except UnicodeDecodeError:
        raise UserError(f"{path / 'metrics.csv'} is not text; give the folder of a run of sink-pretrain") from None
    if not lines:
        raise UserError(f"{path} has no metrics.csv with a line in it; give the folder of a run of sink-pretrain")
    points = []
    for number, line in enumerate(lines, 2):
        try:
            points.append({key: clean(float(text)) if text else None for key, text in line.items()})
        except ValueError:
            raise UserError(f"{path / 'metrics.csv'}, line {number}, has a value that is not a number") from None
        if points[-1].get("tokens") is None or points[-1].get("step") is None:
            raise UserError(f"{path / 'metrics.csv'}, line {number}, has no step or no tokens")
    config = path / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    provenance = read_provenance(str(path)) if checkpoint_steps(path) else {}
    return Run(path, clean(name), points, clean(text), clean(provenance))


# --------------------------------------------------------------------------------------------------------------- maps


def read_maps(path: Path) -> Maps:
    """The maps.csv in a folder that `sink-eval sinks --maps` made."""
    file = path / "maps.csv"
    if not file.is_file():
        raise UserError(f"{path} has no maps.csv; give a folder that sink-eval sinks --maps made")
    heads: dict[tuple[int, int], list[tuple[int, str, float | None, float | None]]] = {}
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            reader = csv.reader(lines)
            if next(reader, None) != MAP_COLUMNS:
                raise ValueError("other columns")
            for layer, head, query, key, logit, weight in reader:
                if key != "sink" and not 0 <= int(key) <= int(query):
                    raise ValueError("a key that a query does not see")
                cell = (int(query), key, clean(float(logit)), clean(float(weight)))
                heads.setdefault((int(layer), int(head)), []).append(cell)
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file} is not what sink-eval sinks --maps writes ({error}); make it again") from None
    if not heads:
        raise UserError(f"{file} holds no map; make it again with sink-eval sinks --maps")
    return Maps(path, heads)
