"""Token shards: the format of a prepared folder, and reading it back as one long stream.

    manifest.json              describes tokenizer, splits, shards and fingerprint; written last
    tokenizer.json             the tokenizer that the text was encoded with
    train-00000.bin …          ids, uint16 or uint32, little-endian; every shard of a split but the last is full
    train-00000.offsets.npy    uint64: token offsets of the documents that start in this shard
    validation-…, test-…       the same
    test.jsonl                 the held-out test documents as text, for any other tokenizer

An end-of-text token follows each document. No shard holds a sink: the sink belongs to the model, and twins read the
same text (DESIGN.md, "Twins read the same text").
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recipes.data.megatron import DTYPES as MEGATRON_DTYPES
from sinkmodel.bounds import held
from sinkmodel.errors import UserError, shell
from sinkmodel.files import read_json, sha256_of
from sinkmodel.fingerprint import fingerprint_of
from sinkmodel.progress import CountedProgress

FORMAT = "sinkmodel-tokens"
VERSION = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"  # instead of the manifest while the folder is being made: recipes/data/writing.py
TOKENIZER = "tokenizer.json"
DTYPES = ("uint16", "uint32", *MEGATRON_DTYPES.values())
BLOCK = 1 << 22  # bytes read at a time
AGAIN = "prepare the folder again with sink-prepare"


class ForeignId(UserError):
    """A shard holds an id that is not in the vocabulary. Any rank prints it: it may be the only one to read the id."""

    def __init__(self, message: str):
        super().__init__(message, any_rank=True)


@dataclass(frozen=True)
class Shard:
    file: Path
    tokens: int
    sha256: str


@dataclass
class TokenSplit:
    """One split as a stream of `tokens` ids. It may be pickled: after that, the first read maps the shards again.

    `row_tokens` is None for a stream that may be cut anywhere. If the text comes as rows that must stay whole (Pythia's
    pre-shuffled files), it is their length, 2,049.
    """

    tokens: int
    documents: int
    row_tokens: int | None
    fingerprint: str
    tokenizer_file: Path
    vocabulary: int
    eos_id: int | None
    pad_id: int | None
    dtype: str
    shards: list[Shard]
    _maps: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0, *(shard.tokens for shard in self.shards)])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens `start` to `start + length` of the stream, int64 [length]. IndexError beyond its end.

        Raises ForeignId for an id that is not in the vocabulary: `open_split(verify="sizes")` does not read the ids.
        """
        if start < 0 or length < 0 or start + length > self.tokens:
            raise IndexError(f"tokens {start} to {start + length} of a split of {self.tokens}")
        tokens = np.empty(length, dtype=np.int64)
        done = 0
        while done < length:
            shard = int(np.searchsorted(self._starts, start + done, side="right")) - 1
            place = start + done - int(self._starts[shard])
            take = min(length - done, self.shards[shard].tokens - place)
            ids = self._map(shard)[place : place + take]
            if (found := _first_foreign(ids, self.vocabulary)) is not None:
                raise _foreign(self.shards[shard], place + found, int(ids[found]), self.vocabulary)
            tokens[done : done + take] = ids
            done += take
        return tokens

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            import torch

            # Not np.memmap: each of its maps keeps a file open, and there may be more shards than a process may open.
            dtype, shard_file = _little_endian(self.dtype), self.shards[shard].file
            size = self.shards[shard].tokens * dtype.itemsize
            self._maps[shard] = torch.from_file(str(shard_file), size=size, dtype=torch.uint8).numpy().view(dtype)
        return self._maps[shard]


def open_split(folder: Path, split: str, verify: str = "full") -> TokenSplit:
    """One split of a prepared folder.

    `verify="full"` reads every shard once, compares its SHA-256 (about a second per gigabyte), checks that its ids are
    in the vocabulary, and prints its progress if that takes long. `"sizes"` compares only lengths.

    Raises UserError for a folder without manifest, a split without tokens, and a shard or tokenizer that is missing,
    cut short or altered.
    """
    assert verify in ("full", "sizes")
    manifest = read_manifest(folder)
    altered = UserError(f"{folder / MANIFEST} has been altered: it does not fit its shards; {AGAIN}")
    try:
        present = [name for name, entry in manifest["splits"].items() if entry["tokens"]]
        if split not in present:
            raise UserError(f"{folder} has no {split} split; it has {', '.join(present)}; {AGAIN} to have one")
        entry, tokenizer = manifest["splits"][split], manifest["tokenizer"]
        shards = [
            Shard(_shard_file(folder, manifest, entry, shard["file"]), shard["tokens"], shard["sha256"])
            for shard in entry["shards"]
        ]
        found = TokenSplit(
            tokens=entry["tokens"],
            documents=entry["documents"],
            row_tokens=entry["row_tokens"],
            fingerprint=manifest["fingerprint"],
            tokenizer_file=held(folder, tokenizer["file"], folder / MANIFEST),
            vocabulary=tokenizer["vocabulary"],
            eos_id=tokenizer["eos_id"],
            pad_id=tokenizer["pad_id"],
            dtype=entry["dtype"],
            shards=shards,
        )
        if fingerprint_of(tokenizer["sha256"], manifest["splits"]) != found.fingerprint:
            raise altered
        if sum(shard.tokens for shard in shards) != found.tokens or found.dtype not in DTYPES:
            raise altered
        if not isinstance(found.vocabulary, int):
            raise altered
    except (LookupError, TypeError, AttributeError):
        raise altered from None
    if not found.tokenizer_file.is_file() or sha256_of(found.tokenizer_file) != tokenizer["sha256"]:
        raise UserError(f"{found.tokenizer_file} is missing or not the one that the shards were made with; {AGAIN}")
    for shard in shards:
        _check_size(shard, np.dtype(found.dtype).itemsize)
    if verify == "full":
        _check_contents(found, f"checking {folder} {split}")
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; make it with: {shell('sink-prepare', '--output', folder)} …")
    if not (folder / MANIFEST).exists():
        unfinished = (folder / PROGRESS).exists()
        remedy = "its preparation was not finished: run the same sink-prepare again" if unfinished else AGAIN
        raise UserError(f"{folder} has no {MANIFEST}; {remedy}")
    try:
        manifest = read_json(folder / MANIFEST)
    except UserError as error:
        raise UserError(f"{error}; {AGAIN}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{folder / MANIFEST} does not describe token shards; give a folder made by sink-prepare")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{folder / MANIFEST} has version {manifest.get('version')}, but this program reads {VERSION}; {AGAIN}"
        )
    if not {"splits", "tokenizer", "fingerprint"} <= manifest.keys():
        raise UserError(f"{folder / MANIFEST} has been altered: a part of it is missing; {AGAIN}")
    return manifest


def dtype_for(vocabulary: int) -> str:
    return "uint16" if vocabulary <= 1 << 16 else "uint32"


def _shard_file(folder: Path, manifest: dict[str, Any], entry: dict[str, Any], name: Any) -> Path:
    """The path of a shard: inside the folder, except for the rows of a Megatron index, which are not copied."""
    rows = entry["row_tokens"] and manifest.get("settings", {}).get("index")
    return Path(name) if rows and Path(name).is_absolute() else held(folder, name, folder / MANIFEST)


def _first_foreign(ids: np.ndarray, vocabulary: int) -> int | None:
    """Index of the first id that is not in the vocabulary, or None. As unsigned numbers, negative ids are large."""
    unsigned = ids.view(ids.dtype.str.replace("i", "u"))
    return int(np.argmax(unsigned >= vocabulary)) if len(ids) and unsigned.max() >= vocabulary else None


def _foreign(shard: Shard, place: int, token_id: int, vocabulary: int) -> ForeignId:
    return ForeignId(
        f"the shard {shard.file} holds the id {token_id} at token {place:,}, but its tokenizer has the ids 0 to "
        f"{vocabulary - 1}: it was made with another tokenizer, or is damaged; {AGAIN}"
    )


def _little_endian(dtype: str) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def _check_size(shard: Shard, itemsize: int) -> None:
    if not shard.file.is_file():
        raise UserError(f"the shard {shard.file} is missing; put it back, or {AGAIN}")
    size, expected = shard.file.stat().st_size, shard.tokens * itemsize
    if size != expected:
        what = "cut short" if size < expected else "too long"
        raise UserError(f"the shard {shard.file} is {what}: {size} bytes, not {expected}; restore it, or {AGAIN}")


def _check_contents(split: TokenSplit, task: str) -> None:
    dtype = _little_endian(split.dtype)
    with CountedProgress(task, "bytes", split.tokens * dtype.itemsize) as progress:

        def check(shard: Shard) -> None:
            digest, read, foreign = hashlib.sha256(), 0, None
            with shard.file.open("rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
                    ids = np.frombuffer(block, dtype)
                    if foreign is None and (found := _first_foreign(ids, split.vocabulary)) is not None:
                        foreign = _foreign(shard, read + found, int(ids[found]), split.vocabulary)
                    read += len(ids)
                    progress.add(len(block))
            if digest.hexdigest() != shard.sha256:
                raise UserError(
                    f"the shard {shard.file} has been altered (its SHA-256 differs); restore it, or {AGAIN}"
                )
            if foreign is not None:
                raise foreign

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
            list(pool.map(check, split.shards))
