"""What the name of a model leads to: a run, a checkpoint, a model folder, a GGUF file or a package with one, the Hub.

`loading` reads models by such a name, `tokenizer_loading` tokenizers.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Literal

from sinkmodel.errors import UserError

Kind = Literal["run", "folder", "gguf", "file", "hub", "nothing"]


def find_model(name: str) -> tuple[Kind, Path]:
    """The kind of a name and its path: of a package the GGUF file in it, else the name itself.

    A `file` is a checkpoint, if it is a model at all. A Hub name is `org/name`, unless a folder `org` is here.
    Raises UserError if a package of this name is installed that does not ship exactly one GGUF file.
    """
    path = Path(name)
    if path.is_dir():
        return "run" if (path / "checkpoints").is_dir() else "folder", path
    if path.is_file():
        return "gguf" if path.suffix == ".gguf" else "file", path
    if (package := _gguf_in_package(name)) is not None:
        return "gguf", package
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not path.parent.is_dir():
        return "hub", path
    return "nothing", path


def _gguf_in_package(name: str) -> Path | None:
    """The one GGUF file that an installed distribution ships; found by its file list, nothing of it is imported."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        return None
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in distribution.files or [] if file.suffix == ".gguf"]
    if len(found) != 1:
        raise UserError(f"the package {name} ships {len(found)} .gguf files; give the path of the one that you mean")
    if not found[0].is_file():
        raise UserError(f"{found[0]} is missing; install {name} again")
    return found[0]
