"""Names of revisions, as Pythia has them: a branch `step1000` a checkpoint; and `revisions.txt`, which lists them."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAIN = "main"
LIST = "revisions.txt"  # on main


def branch_of(step: int) -> str:
    return f"step{step}"


def final_tag(step: int) -> str:
    """Of the end of training: it stays, whatever main becomes."""
    return f"final-step{step}"


def is_checkpoint(branch: str) -> bool:
    return re.fullmatch(r"step\d+", branch) is not None


def listing(branches: Iterable[str]) -> bytes:
    """The branches of checkpoints, one a line, in order."""
    steps = sorted(int(name.removeprefix("step")) for name in branches if is_checkpoint(name))
    return "".join(f"{branch_of(step)}\n" for step in steps).encode()
