"""Escape text of users and models for Markdown, so that it is never taken for markup."""

from __future__ import annotations

import re

SPECIAL = re.compile(r"([\\`*_\[\]<>|~#$])")  # characters that are markup within a line


def escaped(text: object) -> str:
    """The text as one line that Markdown shows literally."""
    return SPECIAL.sub(r"\\\1", one_line(text).replace("&", "&amp;"))


def code_span(text: object) -> str:
    """The text as inline code. Backticks cannot be escaped in it, so the delimiter has one more than the text."""
    line = one_line(text)
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def link(address: object) -> str:
    """A link, if the text is a web address; else the text, escaped."""
    line = one_line(address)
    return f"<{line}>" if re.fullmatch(r"https?://[^\s<>\\`|]+", line) else escaped(line)


def one_line(text: object) -> str:
    return " ".join(str(text).split())
