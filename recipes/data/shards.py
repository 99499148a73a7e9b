"""Token shards: the format of a prepared folder, and reading it back as one long stream.

    manifest.json              what is here: tokenizer, splits, shards, fingerprint; written last
    tokenizer.json             what the text was encoded with
    train-00000.bin …          ids, uint16 or uint32, little-endian; every shard of a split but the last is full
    train-00000.offsets.npy    uint64: where each document that starts in this shard starts, in tokens
    validation-…, test-…       the same
    test.jsonl                 the held-out test documents as text, for any other tokenizer

Documents follow one another, each with an end-of-text token behind it. No shard holds a sink: it belongs to the model,
and twins read the same text (design, decision 2).
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sinkmodel.errors import UserError, shell
from sinkmodel.files import read_json, sha256_of
from sinkmodel.progress import CountedProgress

FORMAT = "sinkmodel-tokens"
VERSION = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"  # in its place while the folder is being made: recipes/data/writing.py
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "validation", "test")
BLOCK = 1 << 22  # bytes read at a time
AGAIN = "prepare the folder again with sink-prepare"


@dataclass(frozen=True)
class Shard:
    file: Path
    tokens: int
    sha256: str


@dataclass
class TokenSplit:
    """One split as a stream of `tokens` ids. It may be pickled: shards are mapped again where it is first read.

    `row_tokens` is None for a stream that may be cut anywhere, and the length of a row where the text comes as rows
    that belong together (Pythia's pre-shuffled files: 2,049).
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
        """Tokens `start` to `start + length` of the stream, int64 [length]. IndexError beyond its end."""
        if start < 0 or length < 0 or start + length > self.tokens:
            raise IndexError(f"tokens {start} to {start + length} of a split of {self.tokens}")
        tokens = np.empty(length, dtype=np.int64)
        done = 0
        while done < length:
            shard = int(np.searchsorted(self._starts, start + done, side="right")) - 1
            inside = start + done - int(self._starts[shard])
            take = min(length - done, self.shards[shard].tokens - inside)
            tokens[done : done + take] = self._map(shard)[inside : inside + take]
            done += take
        return tokens

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.shards[shard].file, dtype=_little_endian(self.dtype), mode="r")
        return self._maps[shard]


def open_split(folder: Path, split: str, verify: str = "full") -> TokenSplit:
    """One split of a prepared folder.

    `verify="full"` reads every shard once and compares its SHA-256 (about a second for a gigabyte), and says how far it
    is where that takes long; `"sizes"` compares lengths alone. Raises UserError for a folder without manifest, a split
    without tokens, and a shard or tokenizer that is missing, cut short or altered.
    """
    assert verify in ("full", "sizes")
    manifest = read_manifest(folder)
    altered = UserError(f"{folder / MANIFEST} has been altered: it does not fit its shards; {AGAIN}")
    try:
        present = [name for name, entry in manifest["splits"].items() if entry["tokens"]]
        if split not in present:
            raise UserError(f"{folder} has no {split} split; it has {', '.join(present)}; {AGAIN} to have one")
        entry, tokenizer = manifest["splits"][split], manifest["tokenizer"]
        shards = [Shard(folder / shard["file"], shard["tokens"], shard["sha256"]) for shard in entry["shards"]]
        found = TokenSplit(
            tokens=entry["tokens"],
            documents=entry["documents"],
            row_tokens=entry["row_tokens"],
            fingerprint=manifest["fingerprint"],
            tokenizer_file=folder / tokenizer["file"],
            vocabulary=tokenizer["vocabulary"],
            eos_id=tokenizer["eos_id"],
            pad_id=tokenizer["pad_id"],
            dtype=entry["dtype"],
            shards=shards,
        )
        if fingerprint_of(tokenizer["sha256"], manifest["splits"]) != found.fingerprint:
            raise altered
        if sum(shard.tokens for shard in shards) != found.tokens:
            raise altered
    except (LookupError, TypeError, AttributeError):
        raise altered from None
    if not found.tokenizer_file.is_file() or sha256_of(found.tokenizer_file) != tokenizer["sha256"]:
        raise UserError(f"{found.tokenizer_file} is missing or not the one that the shards were made with; {AGAIN}")
    for shard in shards:
        _check_size(shard, np.dtype(found.dtype).itemsize)
    if verify == "full":
        _check_contents(shards, f"checking {folder} {split}", np.dtype(found.dtype).itemsize)
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; make it with: {shell('sink-prepare', '--output', folder)} …")
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
            f"{folder / MANIFEST} has version {manifest.get('version')}, this program reads {VERSION}; {AGAIN}"
        )
    if not {"splits", "tokenizer", "fingerprint"} <= manifest.keys():
        raise UserError(f"{folder / MANIFEST} has been altered: a part of it is missing; {AGAIN}")
    return manifest


def fingerprint_of(tokenizer_sha256: str, splits: dict[str, Any]) -> str:
    """SHA-256 over the tokenizer's hash and, split by split, what each shard holds: the same bytes, the same print."""
    digest = hashlib.sha256(tokenizer_sha256.encode())
    for name in SPLITS:
        entry = splits.get(name, {"shards": []})
        for shard in entry["shards"]:
            digest.update(
                f"\n{name} {entry['dtype']} {entry['row_tokens']} {shard['tokens']} {shard['sha256']}".encode()
            )
    return digest.hexdigest()


def dtype_for(vocabulary: int) -> str:
    return "uint16" if vocabulary <= 1 << 16 else "uint32"


def _little_endian(dtype: str) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def _check_size(shard: Shard, itemsize: int) -> None:
    if not shard.file.is_file():
        raise UserError(f"the shard {shard.file} is missing; put it back, or {AGAIN}")
    size, expected = shard.file.stat().st_size, shard.tokens * itemsize
    if size != expected:
        what = "cut short" if size < expected else "too long"
        raise UserError(f"the shard {shard.file} is {what}: {size} bytes, not {expected}; restore it, or {AGAIN}")


def _check_contents(shards: list[Shard], task: str, itemsize: int) -> None:
    with CountedProgress(task, "bytes", sum(shard.tokens for shard in shards) * itemsize) as progress:

        def check(shard: Shard) -> None:
            digest = hashlib.sha256()
            with shard.file.open("rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
                    progress.add(len(block))
            if digest.hexdigest() != shard.sha256:
                raise UserError(
                    f"the shard {shard.file} has been altered (its SHA-256 differs); restore it, or {AGAIN}"
                )

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib frees the interpreter while it hashes
            list(pool.map(check, shards))
