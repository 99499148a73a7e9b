"""From text to a prepared folder: the split of each document, the tokenizer, the encoding, the summary."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.data import megatron
from recipes.data.corpus import Corpus
from recipes.data.errors import STAY
from recipes.data.hub_dataset import HubDataset
from recipes.data.local_files import LocalFiles
from recipes.data.pipeline import PIECE, PREFIX, Place, beginning, cut, encode_units, make_units, split_of
from recipes.data.settings import PrepareConfig
from recipes.data.shards import MANIFEST, PROGRESS, TOKENIZER, dtype_for, open_split
from recipes.data.tokenization import Vocabulary, cuts_exactly, load_vocabulary
from recipes.data.workers import train_apart
from recipes.data.writing import FolderWriter, holds_tokenizer, refuse_other_settings, state_of
from recipes.training.settings import DataSettings
from sinkmodel.console import put, say
from sinkmodel.errors import UserError
from sinkmodel.files import sha256_of
from sinkmodel.locks import locked
from sinkmodel.progress import CountedProgress, Progress

SAVE_EVERY = 5.0  # seconds between saves, the most that a kill loses; longer if many files make a save slow
SAMPLE = 1 << 25  # characters that a tokenizer is trained on
UNCUT = 1 << 40
USUAL_ROW = DataSettings().sequence


@dataclass(frozen=True)
class Source:
    """A corpus and the split of its documents: one for all, or if None, chosen for each document by its beginning."""

    corpus: Corpus
    split: str | None
    choose: Callable[[str], str]


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Prepare the folder, or resume its preparation; returns its manifest. Raises UserError for wrong input."""
    sources = _sources(config)
    given = load_vocabulary(config.tokenizer) if config.tokenizer else None
    folder = Path(config.output)
    made_here = not folder.exists()
    try:
        with locked(folder):
            state = state_of(folder)
            if state is not None:
                state = _adopt(sources, state)
            settings = _settings(config, sources, given)
            if state is not None:
                _refuse_other_files(folder, _begun(state["settings"], state), settings, "place" not in state)
                refuse_other_settings(folder, _begun(state["settings"], state), _begun(settings, state))
            if (folder / MANIFEST).exists():
                assert state is not None
                return _found_complete(folder, state)
            manifest = _prepare(config, folder, settings, sources, given, state)
    finally:
        if made_here and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    _summarise(config, folder, manifest)
    return manifest


def _adopt(sources: list[Source], state: dict[str, Any]) -> dict[str, Any]:
    """Put the sources into the order of an earlier run of this preparation; returns the state from which to resume.

    If the file that was being read has been edited or removed since, that is the state before this file. So a user who
    repairs a damaged file keeps the work done before it. Files that no run has begun may change, appear or disappear.
    """
    recorded = state["settings"]["sources"]
    for source, earlier in zip(sources, recorded):
        if isinstance(source.corpus, HubDataset):
            source.corpus.use_revision_of(earlier)
    candidates, before = [state], state.get("file_start")
    if before is not None and Place(*before["place"]) != Place():
        candidates.append({**state, **before, "file_start": None})
    for candidate in candidates:
        begun = [source.get("files", []) for source in _begun(state["settings"], candidate)["sources"]]
        corpora = [(source.corpus, files) for source, files in zip(sources, begun)]
        if all(corpus.put_first(files) for corpus, files in corpora if isinstance(corpus, LocalFiles)):
            if candidate is not state:
                number = state["place"][0]
                partly = _begun(state["settings"], state)["sources"][number]["files"][-1][0]
                unread = sources[number].corpus.identity()["files"][len(begun[number]) :]
                here = any(name == partly for name, _, _ in unread)
                change = "has changed since it was read in part; it is read again from its start"
                gone = "was read in part and has been removed since; its text is left out"
                say(f"sink-prepare: {partly} {change if here else gone}")
            return candidate
    return state


def _refuse_other_files(folder: Path, there: dict[str, Any], here: dict[str, Any], complete: bool) -> None:
    """Raises UserError, naming the file, if a file that the folder was prepared from has been changed or removed."""
    for earlier, source in zip(there["sources"], here["sources"]):
        if earlier.get("dataset") != source.get("dataset"):
            continue
        now = source.get("files", [])
        lost = [name for name, *stamp in earlier.get("files", []) if [name, *stamp] not in now]
        new = [name for name, *stamp in now if [name, *stamp] not in earlier.get("files", [])]
        whole = complete or "dataset" in source
        if not lost and not (whole and new):
            continue
        if not lost:
            what, remedy = f"without {new[0]}, which has been added since", "leave it out"
        elif lost[0] in new:
            what, remedy = f"from {lost[0]}, which has been edited since", "restore it"
        else:
            what, remedy = f"from {lost[0]}, which has been removed since or is not given", "restore it"
        stay = f" ({STAY})" if "dataset" in source else ""
        raise UserError(f"{folder} was prepared {what}; {remedy}, or choose another output folder{stay}")


def _begun(settings: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """The settings without the local files that a run in this state has not begun to read."""
    if "place" not in state:
        return settings
    place = Place(*state["place"])
    sources = []
    for number, source in enumerate(settings["sources"]):
        if number == place.source and "files" in source and "dataset" not in source:
            source = source | {"files": source["files"][: place.cursor[0] + 1 if place.cursor else 0]}
        elif number > place.source and "dataset" not in source:
            source = source | {"files": []}
        sources.append(source)
    return settings | {"sources": sources}


def _prepare(
    config: PrepareConfig,
    folder: Path,
    settings: dict[str, Any],
    sources: list[Source],
    given: Vocabulary | None,
    progress: dict[str, Any] | None,
) -> dict[str, Any]:
    workers = config.workers or _cores()
    if given is not None:
        vocabulary = given
    elif progress is not None and holds_tokenizer(folder, progress["tokenizer"]):
        vocabulary = _kept_vocabulary(folder, progress["tokenizer"])
    else:
        vocabulary, progress = _train(sources[0], config.vocabulary_size or 0), None
    ready = _scan_index(config, vocabulary, workers)
    dtype = dtype_for(vocabulary.size)
    writer = FolderWriter(folder, settings, vocabulary, dtype, config.shard_tokens, progress, ready)
    if writer.place != Place():
        say(f"sink-prepare: resuming {folder} after {writer.tokens:,} tokens")
    bar, saved, saving = Progress("sink-prepare", "tokens"), time.monotonic(), 0.0
    try:
        limit = PIECE if cuts_exactly(vocabulary.definition) else UNCUT
        units = make_units([(source.corpus, source.choose) for source in sources], writer.place, limit)
        with contextlib.closing(encode_units(units, vocabulary.definition, dtype, workers)) as encoded_units:
            for encoded in encoded_units:
                writer.write(encoded)
                bar.update(writer.tokens, _share(sources, encoded.unit.end.source))
                if (began := time.monotonic()) - saved > SAVE_EVERY * max(1, 4 * saving):
                    writer.save()
                    saved = time.monotonic()
                    saving = saved - began
        return writer.finish(_describe(config, sources))
    except BaseException as error:
        kept = writer.abandon()
        if kept and isinstance(error, KeyboardInterrupt):
            say(f"sink-prepare: {kept:,} tokens are kept; the same command resumes from there")
        raise
    finally:
        bar.close()


def _sources(config: PrepareConfig) -> list[Source]:
    validation, test = config.fractions
    sources: list[Source] = []

    def add(names: list[str] | str | None, dataset_split: str | None, split: str | None, choose: Any) -> None:
        if names is not None:
            option = f"{split}_input" if split else "input"
            files = LocalFiles(_listed(names), config.text_key, config.separator or None, option)
            sources.append(Source(files, split, choose))
        elif dataset_split is not None:
            sources.append(Source(_dataset(config, dataset_split), split, choose))

    if config.megatron_index is None:
        add(config.input, config.dataset_split, None, lambda text: split_of(text, config.seed, validation, test))
    add(config.validation_input, config.validation_split, "validation", lambda text: "validation")
    add(config.test_input, config.test_split, "test", lambda text: "test")
    seen: dict[Path, str] = {}
    for source in sources:
        if not isinstance(source.corpus, LocalFiles):
            continue
        what = source.corpus.option
        if source.corpus.left_out:
            say(f"sink-prepare: {what}: left out, because they are not text: {source.corpus.left_out}")
        for path in map(Path.resolve, source.corpus.paths):
            if path in seen:
                raise UserError(f"{path} is given as {seen[path]} and as {what}; held-out text must not be trained on")
            seen[path] = what
    return sources


def _dataset(config: PrepareConfig, split: str) -> Corpus:
    assert config.dataset is not None
    if config.dataset == "kjv":
        from recipes.demo.king_james import KingJames

        return KingJames()
    return HubDataset(config.dataset, config.dataset_config, split, config.text_key)


def _listed(names: list[str] | str) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _settings(config: PrepareConfig, sources: list[Source], given: Vocabulary | None) -> dict[str, Any]:
    """Everything that the bytes of the folder depend on. The number of workers does not matter."""
    validation, test = config.fractions
    tokenizer: dict[str, Any] = {"byte-level BPE": config.vocabulary_size, "characters": SAMPLE}
    if given is not None:
        tokenizer = {"sha256": hashlib.sha256(given.definition.encode("utf-8")).hexdigest()}
    index = config.megatron_index
    return {
        "sources": [{"split": source.split} | source.corpus.identity() for source in sources],
        "index": [index.name, sha256_of(index)] if index and megatron.read_index(index) else None,
        "tokenizer": tokenizer,
        "seed": config.seed,
        "validation_fraction": validation,
        "test_fraction": test,
        "shard_tokens": config.shard_tokens,
        "prefix": PREFIX,
        "piece": PIECE,
    }


def _train(source: Source, size: int) -> Vocabulary:
    say(f"sink-prepare: training a byte-level BPE of {size:,} ids on the first {SAMPLE:,} characters at most")
    return train_apart(_sample(source), size)


def _sample(source: Source) -> Iterator[str]:
    """Text to train the tokenizer on: the start of every strand, without held-out documents.

    If there are too many strands, evenly spaced ones are used. A strand is closed before the next is opened: there may
    be more files than a process may have open.
    """
    strands = source.corpus.strands()
    strands = strands[:: -(-len(strands) * PREFIX // SAMPLE)]  # each yields at least PREFIX characters
    share = SAMPLE // len(strands)
    whole = PIECE if share >= PIECE else 0  # longer pieces (text without a space) are cut to the share
    for strand in strands:
        left = share
        with contextlib.closing(strand):
            for _, chunks in strand:
                head, chunks = beginning(chunks)
                if source.choose(head) != "train":
                    continue
                for piece in cut(chunks):
                    yield piece[: max(left, whole)]
                    left -= len(piece)
                    if left <= 0:
                        break
                if left <= 0:
                    break


def _kept_vocabulary(folder: Path, tokenizer: dict[str, Any]) -> Vocabulary:
    definition = (folder / TOKENIZER).read_text(encoding="utf-8")
    return Vocabulary(definition, tokenizer["vocabulary"], tokenizer["eos_id"], tokenizer["pad_id"])


def _scan_index(config: PrepareConfig, vocabulary: Vocabulary, threads: int) -> dict[str, Any]:
    """The manifest entry of a Megatron index as the train split, which needs no encoding; empty for text."""
    index = config.megatron_index
    if index is None:
        return {}
    with CountedProgress("sink-prepare", "bytes", megatron.read_index(index).bytes) as progress:
        return {"train": megatron.split_entry(index, vocabulary.size, vocabulary.eos_id, threads, progress.add)}


def _share(sources: list[Source], current: int) -> float | None:
    """Share of all text that has been read; None if the size of some of it is not known."""
    corpora = [source.corpus for source in sources]
    if len(corpora) == 1:
        return corpora[0].fraction()
    if not all(isinstance(corpus, LocalFiles) for corpus in corpora):
        return None
    sizes = [corpus.size for corpus in corpora if isinstance(corpus, LocalFiles)]
    here = (corpora[current].fraction() or 0.0) * sizes[current] if current < len(sizes) else 0.0
    return (sum(sizes[:current]) + here) / (sum(sizes) or 1)


def _cores() -> int:
    """Number of cores that this process may use; on macOS, where that is not known, of all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _describe(config: PrepareConfig, sources: list[Source]) -> str:
    if config.dataset is not None:
        revision = sources[0].corpus.identity().get("revision")
        name = f"{config.dataset}@{revision}" if revision else config.dataset
        return " ".join(filter(None, (name, config.dataset_config, config.dataset_split)))
    return ", ".join(Path(name).name for name in _listed(config.input or []))


def _found_complete(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    for name, entry in manifest["splits"].items():
        if entry["tokens"]:
            open_split(folder, name, verify="sizes")
    (folder / PROGRESS).unlink(missing_ok=True)  # left if a run was killed just after writing the manifest
    say(f"sink-prepare: {folder} is already complete")
    return manifest


def _summarise(config: PrepareConfig, folder: Path, manifest: dict[str, Any]) -> None:
    for name, entry in manifest["splits"].items():
        shards = len(entry["shards"])
        put(f"{name:<10} {entry['documents']:>12,} documents {entry['tokens']:>16,} tokens {shards:>6} shard(s)")
    if manifest["skipped"]:
        put(f"skipped    {manifest['skipped']:>12,} rows without text (null, empty or blank)")
    tokenizer = manifest["tokenizer"]
    put(f"tokenizer  {tokenizer['vocabulary']:,} ids; fingerprint {manifest['fingerprint'][:16]}; in {folder}")
    for split, wanted in zip(("validation", "test"), config.fractions):
        if wanted and config.megatron_index is None and not manifest["splits"][split]["tokens"]:
            say(
                f"sink-prepare: the {split} split got no document; raise {split}_fraction, take another seed, "
                f"or give {split}_input"
            )
    larger = "raise validation_fraction, or give more text"
    if config.validation_input or config.validation_split:
        larger = f"give more {'validation_input' if config.validation_input else 'text in validation_split'}"
    for split, remedy in (("train", "give more text"), ("validation", larger)):
        entry = manifest["splits"][split]
        if entry["row_tokens"] is None and 0 < entry["tokens"] <= USUAL_ROW:
            say(
                f"sink-prepare: the {split} split has {entry['tokens']:,} tokens, less than one row of sink-pretrain's "
                f"usual data.sequence = {USUAL_ROW:,}; {remedy}, or train with a shorter data.sequence"
            )
