"""JSON lines: one object a line, blank lines skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sinkmodel.errors import UserError
from sinkmodel.text.content import COMPRESSIONS, Content

Row = dict[str, Any]


def read_json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """(line number from 1, object) of each line of a file, which may be compressed.

    Raises UserError with the line for what is not a JSON object, and for bytes that are not UTF-8.
    """
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}; give a .jsonl file")
    suffix = path.suffix.lower()
    content = Content(path, suffix if suffix in COMPRESSIONS else "")
    for number, line in enumerate(content.lines(), 1):
        if line.strip():
            row = parse_line(content, number, line)
            yield number, _characters(row) if b"\\u" in line else row


def parse_line(content: Content, number: int, line: bytes) -> Row:
    """The object of one line that is not blank."""
    where = f"{content.path}:{number}"
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        place = f"in line {number}, byte {error.start} of the line"
        raise content.not_utf8(place, error.reason, line, 0 if number == 1 else 1) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a JSON object ({error}); {_remedy(number, line)}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object; {_remedy(number, line)}")
    return row


def whole_characters(text: str) -> str:
    """The text with each half of a surrogate pair, which an escape may be, as U+FFFD, as decoders do."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def first_row(path: Path, compression: str) -> Row | None:
    """The object of the first line that is not blank; an empty one if all are.

    None if the file is not JSON lines: JSON files also hold an array, or one object on several lines.
    """
    content = Content(path, compression)
    beginning = next((block.lstrip() for block in content.blocks() if block.strip()), b"{")
    if not beginning.startswith(b"{"):
        return None  # known without reading an array, which may be one long line
    line = next((line for line in content.lines() if line.strip()), b"{}")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _remedy(number: int, line: bytes) -> str:
    if number == 1 and line.lstrip().startswith(b"["):
        return "turn the array into lines with: jq -c '.[]' IN.json > OUT.jsonl"
    if number == 1 and line.strip() == b"{":
        return "turn it into one line an object with: jq -c . IN.json > OUT.jsonl"
    return ".jsonl has one object a line"


def _characters(row: Row) -> Row:
    return json.loads(whole_characters(json.dumps(row, ensure_ascii=False)))
