"""A corpus that is made, not kept: words drawn from a fixed list, so that every test has text without a file."""

from __future__ import annotations

import json
import random
from pathlib import Path

from recipes.data.tokenization import train_vocabulary

SENTENCES = (
    "the king said unto them that day and it came to pass when all people heard his voice they went out into "
    "a great city where water stood by seven gates because John's house was built there, not far from Érd. 1,024 men "
    '(some old; some young) waited\n for what?\n\n "Who knows!"  he\'d say… 天地 and naïve'
)
WORDS = [*SENTENCES.split(" "), "    indented", "  "]  # runs of blanks, which a cut must not divide


def make_text(characters: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    words: list[str] = []
    length = 0
    while length < characters:
        words.append(draw.choice(WORDS))
        length += len(words[-1]) + 1
    return " ".join(words)[:characters]


def make_texts(count: int, characters: int, seed: int = 0) -> list[str]:
    return [f"{number} {make_text(characters, seed * 100_000 + number)}" for number in range(count)]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_tokenizer(path: Path, size: int = 400) -> Path:
    path.write_text(train_vocabulary([make_text(50_000, seed=7)], size).definition, encoding="utf-8")
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
