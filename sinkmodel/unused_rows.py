"""Names of the rows of a model that are no tokens, so that each id of its tokenizer has one."""

from __future__ import annotations

import re

UNUSED = re.compile(r"\[PAD\d+\]")  # llama.cpp's name for such a row


def unused_name(row: int) -> str:
    return f"[PAD{row}]"
