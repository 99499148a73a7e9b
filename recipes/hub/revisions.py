"""Names of revisions, like Pythia's: a branch `step1000` per checkpoint; and `revisions.txt`, which lists them."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAIN = "main"
LIST = "revisions.txt"  # on main


def branch_of(step: int) -> str:
    return f"step{step}"


def final_tag(step: int) -> str:
    """The tag of the end of training. It stays even if main changes."""
    return f"final-step{step}"


def is_checkpoint(branch: str) -> bool:
    return re.fullmatch(r"step\d+", branch) is not None


def listing(branches: Iterable[str]) -> bytes:
    """The branches of checkpoints in the order of their steps, one per line."""
    steps = sorted(int(name.removeprefix("step")) for name in branches if is_checkpoint(name))
    return "".join(f"{branch_of(step)}\n" for step in steps).encode()
