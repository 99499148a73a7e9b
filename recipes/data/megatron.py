"""Pythia's pre-shuffled text: Megatron's MMapIndexedDataset, rows of 2,049 tokens in the order that Pythia read them.

    .idx   b"MMIDIDX\\0\\0", version u64 = 1, dtype code u8, rows u64, documents u64,
           lengths int32[rows], byte offsets int64[rows], first row of each document int64[documents]
    .bin   the tokens, in one file or as name-00000-of-00020.bin … name-00020-of-00020.bin

(gpt-neox `megatron/data/indexed_dataset.py`; pythia `utils/unshard_memmap.py`, whose file names count up to the number
after `of`, inclusive.) The files are not copied: the manifest records their paths.
"""

from __future__ import annotations

import glob
import hashlib
import re
import shlex
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sinkmodel.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
BLOCK = 1 << 24  # bytes read at a time
ROWS = 1 << 20  # index rows checked at a time


@dataclass(frozen=True)
class Index:
    rows: int
    row_tokens: int
    dtype: str

    @property
    def bytes(self) -> int:
        return self.rows * self.row_tokens * np.dtype(self.dtype).itemsize


def refuse_as_text(name: str, option: str = "input") -> None:
    """Raises UserError if a name that was given as text is Megatron data: an .idx, a .bin, their prefix or folder."""
    path = Path(name)
    if path.is_dir():
        there = sorted(path.rglob("*.idx"))
    else:
        stem = re.sub(r"-[\d*?]+-of-[\d*?]+$", "", path.stem) if path.suffix in (".bin", ".idx") else path.name
        index = path.with_name(stem + ".idx")
        there = [index] if index.is_file() else [Path(found) for found in sorted(glob.glob(str(index)))]
    if there:
        raise megatron_error(f"{name} is Megatron data, not text;", there[0], option)
    if path.suffix == ".bin" and (path.exists() or glob.glob(name)):
        raise UserError(
            f"{name} is not text; as Megatron data it needs {index.name} beside it, which is missing; "
            f"get that file too, or give text as {option}"
        )


def megatron_error(what: str, index: Path, option: str) -> UserError:
    """The error for Megatron data in an option that is read as text; its message begins with `what`."""
    remedy = f"give only the .idx file, beside which its .bin files are found: --input {shlex.quote(str(index))}"
    if option != "input":
        remedy = f"{option} must be text, even if input is an .idx: give text files"
    return UserError(f"{what} {remedy}")


def read_index(file: Path) -> Index:
    """Read and check an .idx file. UserError if it is not an index, is cut short, or has rows of different lengths."""
    if not file.is_file():
        raise UserError(f"{file} does not exist; check the name")
    with file.open("rb") as opened:
        header = opened.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise UserError(
            f"{file} is not a Megatron index (it does not begin with MMIDIDX); give the .idx beside the .bin"
        )
    _, version, code, rows, documents = HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise UserError(
            f"{file} has version {version} and data type {code}; only version 1 and types {list(DTYPES)} can be read"
        )
    expected = HEADER.size + rows * (4 + 8) + documents * 8
    if rows == 0 or file.stat().st_size != expected:
        raise UserError(
            f"{file} is cut short or damaged: {file.stat().st_size} bytes, not {expected}; download it again"
        )
    # The arrays after the 34 bytes of the header are not aligned; np.memmap reads them all the same.
    lengths = np.memmap(file, dtype="<i4", mode="r", offset=HEADER.size, shape=(rows,))
    places = np.memmap(file, dtype="<i8", mode="r", offset=HEADER.size + rows * 4, shape=(rows,))
    length, itemsize = int(lengths[0]), np.dtype(DTYPES[code]).itemsize
    for start in range(0, rows, ROWS):
        end = min(rows, start + ROWS)
        if not (lengths[start:end] == length).all():
            raise UserError(f"{file} has rows of different lengths; only pre-shuffled rows of one length can be read")
        if not (places[start:end] == np.arange(start, end, dtype=np.int64) * (length * itemsize)).all():
            raise UserError(f"{file}: its rows do not follow one another in the .bin; download it again")
    return Index(rows, length, DTYPES[code])


def find_parts(file: Path, index: Index) -> list[Path]:
    """The .bin files of an index, in order. Raises UserError if one is missing or too short."""
    whole = file.with_suffix(".bin")
    named = re.compile(re.escape(file.stem) + r"-(\d+)-of-(\d+)\.bin")
    numbered = sorted((int(m[1]), int(m[2]), p) for p in file.parent.iterdir() if (m := named.fullmatch(p.name)))
    if whole.is_file():
        parts = [whole]
    elif numbered:
        parts = [path for _, _, path in numbered]
        present = {number for number, _, _ in numbered}
        missing = [n for n in range(max(present)) if n not in present]
        if missing:
            raise UserError(f"{file.parent}: part {missing[0]} of {file.stem}-*.bin is missing; download it")
    else:
        raise UserError(f"{file} has no {whole.name} and no {file.stem}-00000-of-….bin beside it; download them")
    size, itemsize = sum(path.stat().st_size for path in parts), np.dtype(index.dtype).itemsize
    if size != index.bytes:
        what = f"{len(parts)} .bin file(s) of {file} hold {size} bytes, not {index.bytes}"
        raise UserError(f"the {what}: one is missing, cut short, or of another index; download again")
    for path in parts:
        if path.stat().st_size % itemsize:
            raise UserError(f"{path} ends in the middle of a token; download it again")
    return parts


def split_entry(
    file: Path, vocabulary: int, eos_id: int, threads: int, report: Callable[[int], Any] = lambda read: None
) -> dict[str, Any]:
    """The manifest entry of the rows of an index. Every byte is read once, to hash it and to check the ids.

    `report` is called with the number of bytes read since its last call. Raises UserError if an id is not in the
    vocabulary.
    """
    index = read_index(file)
    parts = find_parts(file, index)

    def scan(part: Path) -> dict[str, Any]:
        digest, documents = hashlib.sha256(), 0
        with part.open("rb") as opened:
            while block := opened.read(BLOCK):
                digest.update(block)
                ids = np.frombuffer(block, dtype=np.dtype(index.dtype).newbyteorder("<"))
                if int(ids.max()) >= vocabulary or int(ids.min()) < 0:
                    raise UserError(
                        f"{part} holds the id {int(ids.max())}, but the tokenizer has {vocabulary} ids: "
                        "it is not the one that the file was made with; give the right --tokenizer"
                    )
                documents += int(np.count_nonzero(ids == eos_id))
                report(len(block))
        tokens = part.stat().st_size // np.dtype(index.dtype).itemsize
        return {"file": str(part.resolve()), "tokens": tokens, "documents": documents, "sha256": digest.hexdigest()}

    with ThreadPoolExecutor(threads) as pool:
        shards = list(pool.map(scan, parts))
    return {
        "tokens": index.rows * index.row_tokens,
        "documents": sum(shard["documents"] for shard in shards),
        "row_tokens": index.row_tokens,
        "dtype": index.dtype,
        "shards": shards,
    }
