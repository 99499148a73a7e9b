"""Reads, cleans and checks the inputs of a report: runs, results of the other commands, attention maps.

Files may come from anybody. NaN and infinity count as not measured. Control characters are replaced. A file that does
not have the form that a command writes raises a UserError that names the place.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from eval.report.blocks import short_names
from sinkmodel.errors import UserError
from sinkmodel.files import read_json, sha256_of
from sinkmodel.results.files import result_of
from sinkmodel.results.parts import Result
from sinkmodel.secrets import redacted

BAD_LETTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # \t and \n are allowed
R = TypeVar("R", bound=Result)
MAP_COLUMNS = ["layer", "head", "query", "key", "logit", "weight"]


@dataclass(frozen=True)
class ResultFile:
    path: Path
    sha256: str
    content: Result

    @property
    def command(self) -> str:
        return self.content.COMMAND


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
    results: list[ResultFile] = field(default_factory=list)
    maps: list[Maps] = field(default_factory=list)

    def of(self, kind: type[R]) -> list[R]:
        """The results of one kind, in the given order."""
        return [file.content for file in self.results if isinstance(file.content, kind)]


def once(paths: Sequence[Path]) -> list[Path]:
    """The paths without repetitions, even if one file or folder is spelled in several ways."""
    found: dict[str, Path] = {}
    for path in paths:
        found.setdefault(os.path.realpath(path), path)
    return list(found.values())


# ------------------------------------------------------------------------------------------------------------ results


def read_result_file(path: Path) -> ResultFile:
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file that a command of sink-eval wrote with --json")
    try:
        content = result_of(clean(read_json(path)), path)
    except RecursionError:
        raise UserError(f"{path} is not a result of sink-eval --json: it is nested too deeply") from None
    return ResultFile(path, sha256_of(path), content)


def clean(value: Any) -> Any:
    """JSON that is safe for a page: NaN and infinity become None, control characters become U+FFFD.

    Credentials in addresses are redacted.
    """
    if isinstance(value, dict):
        return {clean(key): clean(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [clean(inner) for inner in value]
    if isinstance(value, str):
        return redacted(BAD_LETTERS.sub("\ufffd", value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
