"""JSON lines: one object per line; blank lines are skipped."""

from __future__ import annotations

import codecs
import json
import shlex
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from sinkmodel.errors import UserError
from sinkmodel.text.content import COMPRESSIONS, UNPACK, Content

Row = dict[str, Any]


def read_json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield (line number from 1, object) for each line of a file, which may be compressed.

    Raises UserError with the line number for a line that is not a JSON object, and for bytes that are not UTF-8.
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
    """The object in a line that is not blank."""
    where = f"{content.path}:{number}"
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())  # concatenated files have byte order marks inside
    except UnicodeDecodeError as error:
        place = f"in line {number}, byte {error.start} of the line"
        raise content.not_utf8(place, error.reason, line) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a JSON object ({error}); {_remedy(content, line)}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object; {_remedy(content, line)}")
    return row


def whole_characters(text: str) -> str:
    """The text with lone surrogates, which escapes can produce, replaced by U+FFFD, as decoders do."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def first_rows(path: Path, compression: str) -> list[Row] | None:
    """The objects of the first two lines that are not blank; an empty list for a blank file.

    None if the file is JSON of another form: an array, or an object over several lines. Raises UserError for any other
    line that is not an object.
    """
    content = Content(path, compression)
    beginning = next((block.lstrip() for block in content.blocks() if block.strip()), b"")
    if beginning.startswith(b"["):
        return None  # return without reading the array, which may be one long line
    rows: list[Row] = []
    for number, line in islice(((at, line) for at, line in enumerate(content.lines(), 1) if line.strip()), 2):
        if not rows and line.rstrip().endswith((b"{", b"[", b",")):
            return None
        rows.append(parse_line(content, number, line))
    return rows


def _remedy(content: Content, line: bytes) -> str:
    first = content.beginning.removeprefix(codecs.BOM_UTF8).lstrip()
    of_other_form = "'.[]'" if first.startswith(b"[") else "." if line.strip() == b"{" else None
    if of_other_form is None:
        return ".jsonl has one object per line"
    unpack = UNPACK.get(content.compression)
    name = shlex.quote(str(content.path))
    source = f"{unpack} {name} | jq -c {of_other_form}" if unpack else f"jq -c {of_other_form} {name}"
    return f"write one object per line with: {source} > OUT.jsonl"


def _characters(row: Row) -> Row:
    return json.loads(whole_characters(json.dumps(row, ensure_ascii=False)))
