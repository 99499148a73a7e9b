"""Writes a prepared folder so that a kill at any moment loses only seconds, and never leaves a manifest without shards.

Shards grow under their final names. `progress.json`, replaced atomically every few seconds, records how many bytes of
them are valid and where reading resumes. The manifest is written last. If the same command is run again after a kill,
the folder holds the same bytes as after an uninterrupted run.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
import os
from dataclasses import astuple
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from recipes.data.pipeline import ARRAY_CODES, Encoded, Place
from recipes.data.shards import FORMAT, MANIFEST, PROGRESS, TOKENIZER, VERSION
from recipes.data.tokenization import Vocabulary
from sinkmodel.errors import UserError
from sinkmodel.files import atomic_file, read_json, sha256_of, sync, write_json
from sinkmodel.fingerprint import SPLITS, fingerprint_of
from sinkmodel.locks import LOCK

HELD_OUT_TEXT = "test.jsonl"


def state_of(folder: Path) -> dict[str, Any] | None:
    """The manifest or the progress of the preparation in a folder; None if there is none yet.

    Raises UserError for a folder that holds anything else.
    """
    for name in (MANIFEST, PROGRESS):
        if (folder / name).is_file():
            state = read_json(folder / name)
            if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("version") != VERSION:
                break
            return state
    if folder.is_dir() and not all(path.name == LOCK or _is_scratch(path) for path in folder.iterdir()):
        raise UserError(f"{folder} already holds something else; choose another output folder or empty it")
    return None


def refuse_other_settings(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises UserError if the folder was prepared with other settings than those of this command."""
    if there != here:
        name, there, here = _first_difference("", there, here)
        raise UserError(
            f"{folder} was prepared with {name} = {_short(there)}, this command has {_short(here)}; "
            "choose another output folder, or empty it"
        )


class FolderWriter:
    """Takes encoded units in order and writes them to the shards of their splits.

    Args:
        settings: everything that the folder's bytes depend on; recorded in it.
        shard_tokens: number of tokens of a full shard.
        progress: the result of `state_of`, to resume from; None starts from the beginning.
        ready: manifest entries of splits whose shards exist already, by name (`recipes.data.megatron`).
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        vocabulary: Vocabulary,
        dtype: str,
        shard_tokens: int,
        progress: dict[str, Any] | None = None,
        ready: dict[str, Any] | None = None,
    ):
        self.folder, self.settings, self.ready = folder, settings, ready or {}
        self.end_of_text = array.array(ARRAY_CODES[dtype], [vocabulary.eos_id]).tobytes()
        self.tokenizer = describe_tokenizer(vocabulary)
        for path in folder.iterdir():
            if _is_scratch(path):
                path.unlink()
        states = progress["splits"] if progress else {}
        self.place = Place(*progress["place"]) if progress else Place()
        self.file_start = progress.get("file_start") if progress else None  # the state before the current file
        self.splits = {
            name: SplitWriter(folder, name, dtype, shard_tokens, states.get(name))
            for name in SPLITS
            if name not in self.ready
        }
        self.kept = self.tokens  # number of tokens that the last `save` covers
        try:
            if progress is None:
                self.save()  # progress.json marks the folder as ours
            if not holds_tokenizer(folder, self.tokenizer):
                with atomic_file(folder / TOKENIZER) as aside:
                    aside.write_text(vocabulary.definition, encoding="utf-8")
        except BaseException:
            self.abandon()
            raise

    @property
    def tokens(self) -> int:
        return sum(split.tokens for split in self.splits.values())

    def write(self, encoded: Encoded) -> None:
        if encoded.unit.end.file != self.place.file:
            self.file_start = self._state()
        for piece, ids in zip(encoded.unit.pieces, encoded.ids):
            split = self.splits[piece.split]
            if piece.first:
                split.begin_document()
            split.write_text(piece.text, piece.first, piece.last)
            split.write(ids + self.end_of_text if piece.last else ids)
        self.place = encoded.unit.end

    def save(self) -> None:
        """Sync what is written to the disk and record it: a preparation that is killed later resumes from here."""
        for split in self.splits.values():
            split.save()
        content = {"settings": self.settings, "tokenizer": self.tokenizer, "file_start": self.file_start}
        content |= self._state()
        write_json(self.folder / PROGRESS, {"format": FORMAT, "version": VERSION} | content)
        self.kept = self.tokens

    def _state(self) -> dict[str, Any]:
        """The state that a later process needs to resume here."""
        return {"place": astuple(self.place), "splits": {name: split.state() for name, split in self.splits.items()}}

    def finish(self, source: str) -> dict[str, Any]:
        """Close the shards, then write the manifest. Raises UserError if no document is left for training."""
        entries = {name: split.finish() for name, split in self.splits.items()} | self.ready
        if not entries["train"]["tokens"]:
            raise UserError(
                f"no document is left for training: {_counts(entries)}; "
                "lower validation_fraction and test_fraction, or give more documents"
            )
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "source": source,
            "tokenizer": self.tokenizer,
            "splits": {name: entries[name] for name in SPLITS},
            "fingerprint": fingerprint_of(self.tokenizer["sha256"], entries),
            "skipped": self.place.skipped,
            "settings": self.settings,
        }
        sync(self.folder)
        write_json(self.folder / MANIFEST, manifest)
        (self.folder / PROGRESS).unlink()
        return manifest

    def abandon(self) -> int:
        """Close everything; remove the files if no text was saved yet. Returns the number of tokens that are kept.

        It does not save: the error or Ctrl-C that stopped us may have come in the middle of a unit. If half a unit were
        recorded, a resume would write that half twice.
        """
        for split in self.splits.values():
            split.close()
        complete = (self.folder / MANIFEST).exists()
        saved = not complete and (self.folder / PROGRESS).exists()
        if saved and Place(*read_json(self.folder / PROGRESS)["place"]) == Place():
            for split in self.splits.values():
                split.remove_shards()
            for name in (TOKENIZER, PROGRESS):  # progress last: it marks the folder as ours
                (self.folder / name).unlink(missing_ok=True)
        return self.kept


class SplitWriter:
    """The shards of one split. Every shard but the last has exactly `shard_tokens` tokens."""

    def __init__(self, folder: Path, name: str, dtype: str, shard_tokens: int, state: dict[str, Any] | None):
        self.folder, self.name, self.dtype, self.shard_tokens = folder, name, dtype, shard_tokens
        self.itemsize = np.dtype(dtype).itemsize
        state = state or {"finished": [], "tokens": 0, "documents": 0, "text_bytes": 0}
        self.finished: list[dict[str, Any]] = list(state["finished"])
        self.tokens_here: int = state["tokens"]  # in the open shard
        self.offsets = array.array("Q")
        if state["documents"]:
            self.offsets.extend(np.load(self._offsets_file())[: state["documents"]].tolist())
        self.remove_shards(len(self.finished) + bool(self.tokens_here or self.offsets))
        self._file: BinaryIO | None = None
        if self.tokens_here:
            self._file = _open_at(self._shard_file(), self.tokens_here * self.itemsize)
        self._text: BinaryIO | None = None
        if state["text_bytes"]:
            self._text = _open_at(folder / HELD_OUT_TEXT, state["text_bytes"])

    @property
    def tokens(self) -> int:
        return len(self.finished) * self.shard_tokens + self.tokens_here

    def begin_document(self) -> None:
        if self.tokens_here == self.shard_tokens:
            self._close_shard()
        self.offsets.append(self.tokens_here)

    def write(self, ids: bytes) -> None:
        view = memoryview(ids)
        while view:
            if self.tokens_here == self.shard_tokens:
                self._close_shard()
            if self._file is None:
                self._file = self._shard_file().open("wb", buffering=1 << 20)
            take = view[: (self.shard_tokens - self.tokens_here) * self.itemsize]
            self._file.write(take)
            self.tokens_here += len(take) // self.itemsize
            view = view[len(take) :]

    def write_text(self, text: str, first: bool, last: bool) -> None:
        """Keep test documents as text too, one JSON object per line."""
        if self.name == "test":
            if self._text is None:
                self._text = (self.folder / HELD_OUT_TEXT).open("wb")
            line = (
                ('{"text": "' if first else "") + json.dumps(text, ensure_ascii=False)[1:-1] + ('"}\n' if last else "")
            )
            self._text.write(line.encode("utf-8"))

    def save(self) -> None:
        for file in (self._file, self._text):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
        if self.tokens_here or self.offsets:
            self._write_offsets()

    def state(self) -> dict[str, Any]:
        return {
            "finished": list(self.finished),
            "tokens": self.tokens_here,
            "documents": len(self.offsets),
            "text_bytes": self._text.tell() if self._text is not None else 0,
        }

    def finish(self) -> dict[str, Any]:
        if self.tokens_here:
            self._close_shard()
        if self._text is not None:
            self._text.flush()
            os.fsync(self._text.fileno())
        self.close()
        return {
            "tokens": sum(shard["tokens"] for shard in self.finished),
            "documents": sum(shard["documents"] for shard in self.finished),
            "row_tokens": None,
            "dtype": self.dtype,
            "shards": self.finished,
        }

    def close(self) -> None:
        for file in (self._file, self._text):
            if file is not None:
                with contextlib.suppress(OSError):  # on a full disk close() fails like write()
                    file.close()

    def remove_shards(self, first: int = 0) -> None:
        """Remove the shards from number `first` on, which a killed run wrote after its last `save`."""
        for file in self.folder.glob(f"{self.name}-[0-9]*"):
            if int(file.name.removeprefix(f"{self.name}-").partition(".")[0]) >= first:
                file.unlink()
        if first == 0 and self.name == "test":
            (self.folder / HELD_OUT_TEXT).unlink(missing_ok=True)

    def _close_shard(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._write_offsets()
        file = self._shard_file()
        self.finished.append(
            {"file": file.name, "tokens": self.tokens_here, "documents": len(self.offsets), "sha256": sha256_of(file)}
        )
        self.tokens_here, self.offsets = 0, array.array("Q")

    def _write_offsets(self) -> None:
        with atomic_file(self._offsets_file()) as aside, aside.open("wb") as file:
            np.save(file, np.asarray(self.offsets, dtype="<u8"))

    def _shard_file(self) -> Path:
        return self.folder / f"{self.name}-{len(self.finished):05d}.bin"

    def _offsets_file(self) -> Path:
        return self._shard_file().with_suffix(".offsets.npy")


def holds_tokenizer(folder: Path, tokenizer: dict[str, Any]) -> bool:
    """Whether the folder holds, unaltered, the tokenizer that its manifest or progress describes."""
    file = folder / TOKENIZER
    return file.is_file() and sha256_of(file) == tokenizer["sha256"]


def describe_tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
    return {
        "file": TOKENIZER,
        "sha256": hashlib.sha256(vocabulary.definition.encode("utf-8")).hexdigest(),
        "vocabulary": vocabulary.size,
        "eos_id": vocabulary.eos_id,
        "pad_id": vocabulary.pad_id,
    }


def _open_at(file: Path, length: int) -> BinaryIO:
    """Open a file to append after its first `length` bytes; bytes after them, from a killed run, are cut off."""
    size = file.stat().st_size if file.is_file() else 0
    if size < length:
        raise UserError(f"{file} is shorter than {PROGRESS} beside it states; empty the folder and prepare it again")
    opened = file.open("r+b", buffering=1 << 20)
    opened.truncate(length)
    opened.seek(length)
    return opened


def _is_scratch(path: Path) -> bool:
    """Whether this is a temporary file of `atomic_file`, left by a kill."""
    return path.name.startswith(".") and path.name.endswith(".part")


def _first_difference(name: str, there: Any, here: Any) -> tuple[str, Any, Any]:
    """The key of the first difference of two unequal settings, such as `sources.0.files.3`, and both values."""
    if isinstance(there, dict) and isinstance(here, dict):
        pairs = {str(key): (there.get(key, "nothing"), here.get(key, "nothing")) for key in there | here}
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = {str(number): pair for number, pair in enumerate(zip(there, here))}
    else:
        return name, there, here
    if not any(isinstance(part, (dict, list)) for pair in pairs.values() for part in pair) and name:
        return name, there, here  # such as a file's name, size and time, which mean nothing alone
    key, pair = next((key, pair) for key, pair in pairs.items() if pair[0] != pair[1])
    return _first_difference(f"{name}.{key}" if name else key, *pair)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + "…"


def _counts(entries: dict[str, Any]) -> str:
    return ", ".join(f"{name} has {entry['documents']} document(s)" for name, entry in entries.items())
