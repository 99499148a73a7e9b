"""Reads what was measured of a run after its training (results, attention maps, a report), for any logger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sinkmodel.bounds import files_of, real
from sinkmodel.errors import UserError
from sinkmodel.markdown import escaped
from sinkmodel.results.files import content_of, read_result
from sinkmodel.results.verdict import VerdictResult

Cell = float | str | None
VERDICT = ("answer", "speaks_of", "why", "first", "second", "difference", "low", "high", "tokens")


@dataclass(frozen=True)
class ResultTable:
    """A file that `sink-eval QUESTION --json` wrote: its columns with plain values as a table, and its verdict."""

    path: Path
    question: str
    columns: list[str]
    rows: list[list[Cell]]
    verdict: dict[str, Cell]

    @property
    def title(self) -> str:
        return f"{self.question}/{self.path.stem}"

    def markdown(self) -> str:
        """The verdict, if there is one, and the table."""
        head: list[list[Cell]] = [[*self.columns], ["---"] * len(self.columns)]
        lines = [" | ".join(map(_cell, row)) for row in (*head, *self.rows)]
        verdict = ", ".join(f"{name} {_cell(value)}" for name, value in self.verdict.items())
        return "\n".join([verdict, "", *(f"| {line} |" for line in lines)])


@dataclass(frozen=True)
class Measured:
    """Everything that `sink-log` logs besides the curves.

    Args:
        results: files of `sink-eval --json`.
        maps: folders that `sink-eval sinks --maps` made.
        report: the folder that `sink-eval report` made, or None.
        checkpoints: checkpoints by step, to be kept as artifacts.
    """

    results: list[ResultTable] = field(default_factory=list)
    maps: list[Path] = field(default_factory=list)
    report: Path | None = None
    checkpoints: dict[int, Path] = field(default_factory=dict)


def read_measured(
    results: Sequence[Path], maps: Sequence[Path], report: Path | None, checkpoints: dict[int, Path]
) -> Measured:
    """Read the files. Raises UserError for one of the wrong kind, and for a link that leads out of its folder.

    Args:
        checkpoints: checkpoints by step, in `RUN/checkpoints`.
    """
    for path in checkpoints.values():
        real(path.parents[1], path)
    for folder in maps:
        if not real(folder, folder / "maps.png").is_file():
            raise UserError(f"{folder} has no maps.png; give a folder that sink-eval sinks --maps made")
    if report is not None and not (report / "report.html").is_file():
        raise UserError(f"{report} has no report.html; give the folder that sink-eval report made")
    if report is not None:
        files_of(report)
    _refuse_namesakes([path.stem for path in results], "--results")
    _refuse_namesakes([folder.name for folder in maps], "--maps")
    return Measured([read_table(path) for path in results], list(maps), report, checkpoints)


def _refuse_namesakes(names: list[str], option: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two of {option} are called {name}, and would share one panel; rename one of them")


def read_table(path: Path) -> ResultTable:
    """The table of a result. Raises UserError if the file is not one."""
    result = read_result(path)
    content = content_of(result)
    rows = content["rows"]
    columns = [
        name for name in dict.fromkeys(name for row in rows for name in row) if _plain(row.get(name) for row in rows)
    ]
    verdict = content["verdict"] if isinstance(result, VerdictResult) else {}
    shown = {name: verdict[name] for name in VERDICT if name in verdict}
    return ResultTable(path, result.COMMAND, columns, [[row.get(name) for name in columns] for row in rows], shown)


def _plain(values: Any) -> bool:
    return all(value is None or isinstance(value, (int, float, str)) for value in values)


def _cell(value: Cell) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else escaped(value)
