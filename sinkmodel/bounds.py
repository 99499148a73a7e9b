"""Check what belongs to a folder: the file names that a file in it gives, and the links in it that may be followed.

A folder may come from an untrusted source. If a manifest names `../notes.txt`, we do not read that file, and a link to
a private file does not publish it.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sinkmodel.errors import UserError


def inside(folder: Path, name: Any, source: Path) -> Path:
    """The path `folder / name`, for a name that is given in the file `source`.

    Raises UserError unless the name is a relative path without `..` by the rules of POSIX and of Windows.
    """
    paths = (PurePosixPath(name), PureWindowsPath(name)) if isinstance(name, str) and "\0" not in name else ()
    if not paths or any(path.anchor or ".." in path.parts or not path.parts for path in paths):
        raise UserError(
            f"{source} names the file {name!r}, which is not inside {folder}; put the file into the folder and name it "
            "from there, or get the folder from its source again"
        )
    return folder / name


def held(folder: Path, name: Any, source: Path) -> Path:
    """As `inside`, for a file that is read as part of the folder. If it is a link, `real` must allow its target."""
    path = inside(folder, name, source)
    real(folder, path)
    return path


def real(folder: Path, path: Path) -> Path:
    """The file that a path in `folder` leads to, after links, if it counts as part of the folder.

    A link may lead to a file of the folder that is not hidden, or to one that the Hub's cache has downloaded. Raises
    UserError for any other link, and for a broken one. If nothing exists at the path, returns it unchanged.
    """
    try:
        target, home = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError):  # RuntimeError: a link to itself
        if path.is_symlink():
            raise UserError(f"{path} is a link to nothing that can be read; remove it, or put a copy there") from None
        return path
    if target.is_relative_to(home):
        if any(part.startswith(".") for part in target.relative_to(home).parts):
            raise UserError(f"{path} leads to {target}, which is hidden; remove the link")
    elif not _in_hub_cache(target):
        raise UserError(
            f"{path} leads out of {folder}, to {target}, which is not part of it; remove the link, or put a copy in "
            "its place"
        )
    return target


def files_of(folder: Path) -> dict[str, Path]:
    """All files of a folder except hidden ones, by their path in it. Links are followed as `real` allows."""
    found: dict[str, Path] = {}

    def look(here: Path, above: tuple[Path, ...]) -> None:
        for path in sorted(here.iterdir()):
            if path.name.startswith("."):
                continue
            target = real(folder, path)
            if target in above:
                raise UserError(f"{path} is a link to {target}, a folder that it is in; remove it")
            if target.is_dir():
                look(path, (*above, target))
            elif target.is_file():
                found[path.relative_to(folder).as_posix()] = target

    look(folder, (folder.resolve(),))
    return found


def _in_hub_cache(target: Path) -> bool:
    """Whether `target` was downloaded from the Hub: a file in `blobs`, or a folder of links to them in `snapshots`."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).resolve()
    return target.is_relative_to(cache) and bool({"blobs", "snapshots"} & {*target.relative_to(cache).parts[:-1]})
