"""Made-up text for the rehearsal of `make evidence-gpu`: python -m bench.gpu.rehearsal FILE.jsonl"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.made_up import words

DOCUMENTS, WORDS = 24, 250
PREPARE = ["--vocabulary-size=300", "--validation-fraction=0.1", "--test-fraction=0.5"]  # as the Makefile has it


def write_documents(file: Path) -> Path:
    """Documents of about the same length, so that the verdict on them is one on other texts too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": words(WORDS, seed)}) + "\n" for seed in range(DOCUMENTS)]
    file.write_text("".join(lines), encoding="utf-8")
    return file


if __name__ == "__main__":
    write_documents(Path(sys.argv[1]))
