"""JSON lines that a user gives: one object a line, blank lines passed over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sinkmodel.errors import UserError

Row = dict[str, Any]


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """The objects of a .jsonl file, each with the number of its line; UserError names the line that is none."""
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}; give a .jsonl file")
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: not a JSON object; .jsonl has one object a line")
                yield number, _characters(row) if "\\u" in line else row
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}); convert it first") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: not a JSON object ({error}); .jsonl has one object a line") from None


def _characters(row: Row) -> Row:
    """An escape may be half of a surrogate pair, which is no character: U+FFFD, as decoders do."""
    text = json.dumps(row, ensure_ascii=False)
    return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
