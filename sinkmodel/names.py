"""Find what a model's name refers to: a run, a checkpoint, a model folder, a GGUF file, a package with one, or the Hub.

`loading` loads models by such a name, and `tokenizer_loading` tokenizers.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Literal

from sinkmodel.errors import UserError

Kind = Literal["run", "folder", "gguf", "row", "file", "hub", "nothing"]

KINDS: dict[str, Kind] = {".gguf": "gguf", ".safetensors": "row"}  # the kind of a file, by its suffix
ROWS = Path(__file__).parent / "rows"  # trained rows that this package ships


def find_model(name: str) -> tuple[Kind, Path]:
    """The kind of a model's name, and its path.

    For a package the path is the GGUF file in it; for `NAME+sink` it is the row that is shipped for the model `NAME`;
    else it is the name itself. A `file` can only be a checkpoint. A Hub name has the form `org/name`, unless a folder
    `org` exists here. Raises UserError if a package of this name is installed but does not ship exactly one GGUF file.
    """
    path = Path(name)
    if path.is_dir():
        return "run" if (path / "checkpoints").is_dir() else "folder", path
    if path.is_file():
        return KINDS.get(path.suffix, "file"), path
    if (row := shipped_row(name)) is not None:
        return "row", row
    if (package := _gguf_in_package(name)) is not None:
        return "gguf", package
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not path.parent.is_dir():
        return "hub", path
    return "nothing", path


def _gguf_in_package(name: str) -> Path | None:
    """The GGUF file that an installed package ships, found in its file list. Nothing of it is imported."""
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


def shipped_row(name: str) -> Path | None:
    """The row file that this package ships for `NAME+sink`; None if the name has another form.

    Raises UserError if no row is shipped for this model.
    """
    if not re.fullmatch(r"[\w.-]+\+sink", name):
        return None
    path = ROWS / f"{name.removesuffix('+sink')}.safetensors"
    if not path.is_file():
        known = ", ".join(f"{row.stem}+sink" for row in sorted(ROWS.glob("*.safetensors")))
        raise UserError(f"{name}: no trained row is shipped for this model; there is {known or 'none at all'}")
    return path
