"""Names for the rows of a model that are not tokens, so that every id of its tokenizer has a name."""

from __future__ import annotations

import re

UNUSED = re.compile(r"\[PAD\d+\]")  # llama.cpp's name for such a row


def unused_name(row: int) -> str:
    return f"[PAD{row}]"
