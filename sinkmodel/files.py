"""Write files and folders atomically: each exists completely or not at all."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sinkmodel.errors import UserError

# Messages of safetensors, and two of torch.save, if a write is incomplete.
FULL_IN_OTHER_WORDS = (
    *("No space left on device", "File too large"),
    *("PytorchStreamWriter failed writing", ". unexpected pos "),
)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a sibling path to write to. If the block succeeds, sync it and rename it to `path`; else remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    except Exception as error:
        _raise_if_disk_is_full(error, path)
        raise
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty sibling folder. If the block succeeds, sync it and rename it to `path`; else remove it.

    Raises UserError if `path` exists and is not an empty folder, since its content may be needed.
    """
    refuse_if_occupied(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.mkdir()
    try:
        yield aside
        for file in aside.rglob("*"):
            sync(file)
        if path.exists():
            path.rmdir()
        os.replace(aside, path)
        sync(path.parent)
    except Exception as error:
        _raise_if_disk_is_full(error, path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class DiskFull(UserError):
    """There was no space for a file. What was at its path before is still there."""


def _raise_if_disk_is_full(error: Exception, path: Path) -> None:
    """Raise DiskFull if `error` means that the disk is full; torch and safetensors have messages of their own."""
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    else:
        full = any(words in str(error) for words in FULL_IN_OTHER_WORDS)
    if full:
        raise DiskFull(
            f"the disk is full: {path} could not be written; make room or choose another folder, then run again"
        ) from None


def refuse_if_occupied(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} already holds something else; choose another output folder or remove it")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir():
        raise UserError(f"{path} cannot be made: {there} is a file; choose another output folder")


def sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a rename after it survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    with atomic_file(path) as aside:
        aside.write_bytes(json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """JSON as UTF-8. Undecodable bytes of a file name are escaped, and read back as the same name."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table as CSV; a number that was not measured (None) becomes an empty field."""
    with atomic_file(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def read_json(path: Path) -> Any:
    """Raises UserError if the file does not exist or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None


def sha256_of(path: Path) -> str:
    digest, block = (
        hashlib.sha256(),
        memoryview(bytearray(1 << 18)),
    )  # one block: a new one each time costs as much again
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()
