"""Reads and writes the files of `sink-eval COMMAND --json`: JSON with the name of the command and a version."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from sinkmodel.errors import UserError
from sinkmodel.files import read_json, write_json
from sinkmodel.results.attention import BirthResult, SinksResult
from sinkmodel.results.latency import LatencyResult, PrefillResult
from sinkmodel.results.memories import MemoriesResult
from sinkmodel.results.parts import SCHEMA, Result
from sinkmodel.results.perplexity import GridResult, PerplexityResult
from sinkmodel.results.schema import Mismatch, from_json, to_json
from sinkmodel.results.streams import LinesResult, QuestionsResult
from sinkmodel.results.tasks import LongContextResult, ZeroshotResult
from sinkmodel.results.verdict import VerdictResult

KINDS: tuple[type[Result], ...] = (
    *(PerplexityResult, VerdictResult, GridResult, SinksResult, BirthResult, LinesResult, QuestionsResult),
    *(ZeroshotResult, LatencyResult, PrefillResult, MemoriesResult, LongContextResult),
)
R = TypeVar("R", bound=Result)
COMMANDS = tuple(dict.fromkeys(kind.COMMAND for kind in KINDS))
STAMP = ("command_line", "date", "versions")  # these come last in a file


def write_result(path: Path, result: Result) -> None:
    write_json(path, content_of(result))


def content_of(result: Result) -> dict[str, Any]:
    """The object that is written for a result."""
    body = to_json(result)
    stamp = {name: body.pop(name) for name in STAMP if name in body}
    return {"command": result.COMMAND, "schema_version": SCHEMA, **body, **stamp}


def read_result(path: Path) -> Result:
    """The result in a file. Raises UserError if it is not one, or has no rows."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give a file that a command of sink-eval wrote with --json")
    try:
        return result_of(read_json(path), path)
    except RecursionError:
        raise UserError(f"{path} is not a result of sink-eval --json: it is nested too deeply") from None


def read_kind(path: Path, kind: type[R]) -> R:
    """Like `read_result`, for one kind of result. Raises UserError if the file holds another kind."""
    result = read_result(path)
    if not isinstance(result, kind):
        raise UserError(f"{path} is a result of sink-eval {result.COMMAND}; give one of sink-eval {kind.COMMAND}")
    return result


def result_of(content: Any, path: Path) -> Result:
    """The result with this content. Raises UserError, which names the file, if it is not one, or has no rows."""
    command = content.get("command") if isinstance(content, dict) else None
    if not isinstance(command, str) or command not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise UserError(f"{path} is not a result of sink-eval --json: its command is {command!r}, not one of {known}")
    version = content.get("schema_version", SCHEMA)
    if version != SCHEMA:
        raise UserError(
            f"{path} is a result of sink-eval {command} with schema version {version!r}, and this sinkmodel reads "
            f"version {SCHEMA}; install the version of sinkmodel that wrote it, or measure it again"
        )
    try:
        result = from_json(_kind_of(command, content), content)
    except Mismatch as error:
        raise UserError(f"{path} is not what sink-eval {command} --json writes: {error}; measure it again") from None
    if not result.rows:  # type: ignore[attr-defined]
        raise UserError(f"{path} has no rows: nothing was measured; measure it again with sink-eval {command}")
    return result


def _kind_of(command: str, content: dict[str, Any]) -> type[Result]:
    """The record of a command. Two commands have two records, which differ in one entry."""
    if command == SinksResult.COMMAND:
        return BirthResult if "born" in content else SinksResult
    if command == LinesResult.COMMAND:
        return LinesResult if content.get("task") == "lines" else QuestionsResult
    return next(kind for kind in KINDS if command == kind.COMMAND)
