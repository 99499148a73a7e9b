"""What wandb has of a run on this disk: the `.wandb` files of its starts, which `wandb sync` uploads one by one.

A file is a log of LevelDB's form: behind a header, blocks of 32 KiB of records, a record that does not fit cut into
parts, each part behind a checksum (4 bytes), its length (2) and its type (1: whole, 2 to 4: first, middle, last).
wandb writes it block by block, so that a SIGKILL takes up to 32 KiB of what was logged.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

HEADER = b":W&B\xe1\xbe\x00"  # name, magic number, version
BLOCK, PART = 1 << 15, struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def files_of(run: Path, identity: str) -> list[Path]:
    """The files of a wandb run in the folder of a run, in the order of their starts."""
    return sorted((run / "wandb").glob(f"*run-*-{identity}/run-{identity}.wandb"))


def mend(run: Path, identity: str) -> None:
    """Make what kills have left fit for `wandb sync`, which otherwise stops at it and leaves out all later starts.

    A record that was cut goes, and so does the folder of a start of which nothing was written. A file of another
    version is left as it is: nobody here knows what is in it.
    """
    for path in files_of(run, identity):
        content = path.read_bytes()
        if not HEADER.startswith(content[: len(HEADER)]):
            continue
        ends = [end for _, end in records(content)]
        if not ends:
            shutil.rmtree(path.parent)
        elif ends[-1] < len(content):
            os.truncate(path, ends[-1])


def last_step(run: Path, identity: str) -> int:
    """The last optimiser step whose line is in the files of this wandb run; -1 where none is."""
    lines = (line for path in files_of(run, identity) for line in history(path))
    return max((step for step, names in lines if "tokens" in names), default=-1)


def history(path: Path) -> Iterator[tuple[int, set[str]]]:
    """Of each line in a `.wandb` file its step, and the names of its numbers."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    for content, _ in records(path.read_bytes()):
        record = Record()
        try:
            record.ParseFromString(content)
        except DecodeError:
            return
        if record.HasField("history"):
            yield (
                record.history.step.num,
                {name for item in record.history.item for name in (item.key, *item.nested_key)},
            )


def records(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Each record of a log, and where it ends; the first that is cut short, or is none, ends them all."""
    if not content.startswith(HEADER):
        return
    place, parts = len(HEADER), b""
    while place + PART.size <= len(content):
        if BLOCK - place % BLOCK < PART.size:  # a block's end that holds no part
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = PART.unpack_from(content, place)
        place += PART.size
        part = content[place : place + length]
        if kind not in (WHOLE, FIRST, MIDDLE, LAST) or len(part) < length:
            return
        place += length
        parts = part if kind in (WHOLE, FIRST) else parts + part
        if kind in (WHOLE, LAST):
            yield parts, place
