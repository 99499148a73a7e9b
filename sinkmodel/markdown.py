"""Text of users and models as Markdown shows it, never as markup."""

from __future__ import annotations

import re

SPECIAL = re.compile(r"([\\`*_\[\]<>|~#$])")  # what Markdown takes for markup in a line


def escaped(text: object) -> str:
    """A text as one line that Markdown shows as it is."""
    return SPECIAL.sub(r"\\\1", one_line(text).replace("&", "&amp;"))


def code_span(text: object) -> str:
    """A text as code within a line; between backticks nothing can be escaped, so there are more of them than in it."""
    line = one_line(text)
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def link(address: object) -> str:
    """An address of the web as a link; any other text as it is."""
    line = one_line(address)
    return f"<{line}>" if re.fullmatch(r"https?://[^\s<>\\`|]+", line) else escaped(line)


def one_line(text: object) -> str:
    return " ".join(str(text).split())
