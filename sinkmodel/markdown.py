"""Text of users and models as Markdown shows it, never as markup."""

from __future__ import annotations

import re

SPECIAL = re.compile(r"([\\`*_\[\]<>|~#$])")  # what Markdown takes for markup in a line


def escaped(text: object) -> str:
    """A text as one line that Markdown shows as it is."""
    return SPECIAL.sub(r"\\\1", " ".join(str(text).split()).replace("&", "&amp;"))
