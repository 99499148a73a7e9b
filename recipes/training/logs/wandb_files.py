"""wandb's files of a run on this disk: a `.wandb` file for each start, which `wandb sync` uploads one by one.

A file has the format of LevelDB's logs: a header, then blocks of 32 KiB that hold records. A record that does not fit
into its block is split into parts. Before each part come its checksum (4 bytes), its length (2 bytes) and its type (1
byte; 1: whole record, 2 to 4: first, middle, last part). wandb writes block by block, so that a SIGKILL loses up to 32
KiB of logged data.
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
    """The files of the wandb run `identity` in a run folder, in the order of the starts."""
    return sorted((run / "wandb").glob(f"*run-*-{identity}/run-{identity}.wandb"))


def mend(run: Path, identity: str) -> None:
    """Repair files that a kill cut short: `wandb sync` stops at such a file and does not upload the later starts.

    An incomplete record at the end is removed, and so is the folder of a start that has no complete record. A file with
    the header of another version is left unchanged, as its format is not known.
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
    """The last optimiser step that was logged in the files of this wandb run; -1 if there is none."""
    lines = (line for path in files_of(run, identity) for line in history(path))
    return max((step for step, names in lines if "tokens" in names), default=-1)


def history(path: Path) -> Iterator[tuple[int, set[str]]]:
    """The step and the names of the numbers of each logged line in a `.wandb` file."""
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
    """Each record of a log with the offset of its end in bytes, up to the first that is cut short or invalid."""
    if not content.startswith(HEADER):
        return
    place, parts = len(HEADER), b""
    while place + PART.size <= len(content):
        if BLOCK - place % BLOCK < PART.size:  # too little room for a part: padding
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
