"""Where exports are tried with nothing of ours: the Pythons of environments that hold torch and transformers alone."""

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


def told(python: str, program: str, *words: Path, place: Path) -> Any:
    """What a program prints last, as JSON; it runs in `place`, away from the checkout and from the user's caches."""
    command = [python, "-I", "-c", program, *map(str, words)]
    environment = {**os.environ, "HF_HOME": str(place / "home")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
