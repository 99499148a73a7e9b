"""Environments with torch and transformers, and without our packages: tests load exports in them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any


def transformers_4() -> str:
    """The Python of the environment with transformers 4.57, which `make test` makes and names."""
    python = os.environ.get("TRANSFORMERS_4")
    assert python, "set TRANSFORMERS_4 to a Python that has torch and transformers 4.57 alone; `make test` does"
    return python


def json_printed_by(python: str, program: str, *words: Path, place: Path) -> Any:
    """Run a program in `place`, without the checkout and the user's caches; returns its last line, read as JSON."""
    command = [python, "-I", "-c", program, *map(str, words)]
    env = {**os.environ, "HF_HOME": str(place / "home")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
