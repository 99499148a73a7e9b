"""Names of the rows of a model that are no tokens, so that each id of its tokenizer has one."""

from __future__ import annotations

import json
import re

UNUSED = re.compile(r"\[PAD\d+\]")  # llama.cpp's name for such a row


def unused_name(row: int) -> str:
    return f"[PAD{row}]"


def without_unused(definition: str) -> str:
    """A `tokenizer.json` without the names of rows that are no tokens: as it was before an export."""
    content = json.loads(definition)
    content["added_tokens"] = [x for x in content.get("added_tokens") or [] if not UNUSED.fullmatch(x["content"])]
    return json.dumps(content, ensure_ascii=False)
