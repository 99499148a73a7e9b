"""Guards: a prepared folder reads back as the tokens that went in, and damage is found before training."""

import hashlib
import io
import itertools
import json
import os
import pickle
import shutil

import numpy as np
import pytest

from recipes.data.shards import open_split
from sinkmodel import progress
from sinkmodel.errors import UserError
from sinkmodel.fingerprint import fingerprint_of

SHARD = 1000
TOKENS = 2500


@pytest.fixture
def folder(tmp_path):
    """Three train shards of 1,000, 1,000 and 500 tokens, ids 0 … 2,499; no test split."""
    (tmp_path / "tokenizer.json").write_text("{}")
    shards = []
    for number in range(3):
        ids = np.arange(number * SHARD, min(TOKENS, (number + 1) * SHARD), dtype="<u2")
        file = tmp_path / f"train-{number:05d}.bin"
        file.write_bytes(ids.tobytes())
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shards.append({"file": file.name, "tokens": len(ids), "documents": 4, "sha256": digest})
    empty = {"tokens": 0, "documents": 0, "row_tokens": None, "dtype": "uint16", "shards": []}
    splits = {
        "train": empty | {"tokens": TOKENS, "documents": 12, "shards": shards},
        "validation": empty | {"tokens": 500, "documents": 4, "shards": shards[2:]},
        "test": empty,
    }
    tokenizer = {
        "file": "tokenizer.json",
        "sha256": hashlib.sha256(b"{}").hexdigest(),
        "vocabulary": 2500,
        "eos_id": 0,
        "pad_id": 1,
    }
    manifest = {
        "format": "sinkmodel-tokens",
        "version": 1,
        "tokenizer": tokenizer,
        "splits": splits,
        "fingerprint": fingerprint_of(tokenizer["sha256"], splits),
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_reading_crosses_shards_at_every_place(folder):
    split = open_split(folder, "train")
    assert (split.tokens, split.documents, split.row_tokens) == (TOKENS, 12, None)
    assert (split.vocabulary, split.eos_id, split.pad_id) == (2500, 0, 1)
    assert split.read(0, TOKENS).tolist() == list(range(TOKENS))
    for start in (0, 1, 998, 999, 1000, 1001, 1999, 2000, 2499, 2500):
        for length in (0, 1, 2, 1000, 1500):
            if start + length <= TOKENS:
                tokens = split.read(start, length)
                assert tokens.dtype == np.int64
                assert tokens.tolist() == list(range(start, start + length))
    with pytest.raises(IndexError):
        split.read(2000, 501)
    with pytest.raises(IndexError):
        split.read(-1, 2)


def test_a_split_travels_to_a_worker_without_its_data(folder):
    split = open_split(folder, "train")
    split.read(0, TOKENS)
    packed = pickle.dumps(split)
    assert len(packed) < 2000  # not the 5,000 bytes of the shards
    assert pickle.loads(packed).read(990, 20).tolist() == list(range(990, 1010))


def test_shards_that_were_read_keep_no_file_open(folder):
    """Risk: training on more shards than a process may have files open ends in EMFILE, hours in."""
    split = open_split(folder, "train")
    before = len(os.listdir("/proc/self/fd"))
    assert split.read(0, TOKENS).tolist() == list(range(TOKENS))
    assert len(os.listdir("/proc/self/fd")) == before


def alter(file):
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(bytes(content))


DAMAGE = {
    "altered": (lambda f: alter(f / "train-00001.bin"), r"train-00001.bin has been altered"),
    "cut short": (
        lambda f: (f / "train-00002.bin").write_bytes(b"x" * 998),
        r"train-00002.bin is cut short: 998 bytes",
    ),
    "too long": (lambda f: (f / "train-00000.bin").write_bytes(b"x" * 2002), r"train-00000.bin is too long"),
    "missing": (lambda f: (f / "train-00001.bin").unlink(), r"train-00001.bin is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"has no manifest.json; prepare the folder"),
    "broken manifest": (lambda f: (f / "manifest.json").write_text("{"), r"manifest.json is not valid JSON"),
    "other manifest": (lambda f: (f / "manifest.json").write_text("{}"), r"does not describe token shards"),
    "other tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{ }"),
        r"tokenizer.json is missing or not the one",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer.json is missing or not the one"),
    "no folder": (lambda f: shutil.rmtree(f), r"is not a folder"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_the_file_and_the_remedy(folder, damage):
    open_split(folder, "train")
    do, message = DAMAGE[damage]
    do(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_split(folder, "train")
    assert ";" in str(caught.value)  # the remedy comes after it


def test_a_manifest_altered_to_fit_altered_shards_is_found(folder):
    alter(folder / "train-00001.bin")
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256((folder / "train-00001.bin").read_bytes()).hexdigest()
    manifest["splits"]["train"]["shards"][1]["sha256"] = digest
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json has been altered"):
        open_split(folder, "train")


def test_sizes_alone_find_a_short_shard_but_not_an_altered_one(folder):
    alter(folder / "train-00001.bin")
    assert open_split(folder, "train", verify="sizes").tokens == TOKENS
    (folder / "train-00001.bin").write_bytes(b"")
    with pytest.raises(UserError, match="cut short"):
        open_split(folder, "train", verify="sizes")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_check_that_takes_long_says_how_far_it_is(folder, terminal, monkeypatch):
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", stderr)
    open_split(folder, "train")
    assert terminal or not stderr.getvalue()  # quick: no line
    seconds = itertools.count(step=11.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    open_split(folder, "train")
    assert f"checking {folder} train: " in stderr.getvalue()
    assert "5k bytes, " in stderr.getvalue()
    assert "100%" in stderr.getvalue()
    assert ("|" in stderr.getvalue()) == terminal


def test_a_split_that_is_not_there_names_those_that_are(folder):
    with pytest.raises(UserError, match="has no test split; it has train, validation"):
        open_split(folder, "test")


def test_the_fingerprint_changes_with_every_part():
    shard = {"file": "a", "tokens": 5, "documents": 1, "sha256": "1"}
    entry = {"dtype": "uint16", "row_tokens": None, "shards": [shard]}
    prints = {
        fingerprint_of("t", {"train": entry}),
        fingerprint_of("u", {"train": entry}),
        fingerprint_of("t", {"validation": entry}),
        fingerprint_of("t", {"train": entry | {"dtype": "uint32"}}),
        fingerprint_of("t", {"train": entry | {"row_tokens": 5}}),
        fingerprint_of("t", {"train": entry | {"shards": [shard | {"sha256": "2"}]}}),
        fingerprint_of("t", {"train": entry | {"shards": [shard, shard]}}),
    }
    assert len(prints) == 7


def sign(manifest):
    """As somebody who makes a whole folder does."""
    manifest["fingerprint"] = fingerprint_of(manifest["tokenizer"]["sha256"], manifest["splits"])


ALTERED = {
    "fewer tokens": lambda m: m["splits"]["train"].update(tokens=m["splits"]["train"]["tokens"] - 5),
    "more tokens": lambda m: m["splits"]["train"].update(tokens=m["splits"]["train"]["tokens"] + 5),
    "another list": lambda m: m.update(splits=[]),
    "no eos": lambda m: m["tokenizer"].pop("eos_id"),
    "another dtype": lambda m: m["splits"]["train"].update(dtype="uint32"),
    "a shorter shard": lambda m: m["splits"]["train"]["shards"][0].update(tokens=7),
    "a vocabulary that is no number": lambda m: m["tokenizer"].update(vocabulary="2500"),
    "settings that are none": lambda m: (
        m.update(settings=[]),
        [entry.update(row_tokens=5) for entry in m["splits"].values()],
        sign(m),
    ),
    "a type that is none of ours": lambda m: ([e.update(dtype="object") for e in m["splits"].values()], sign(m)),
}


@pytest.mark.parametrize("change", ALTERED.values(), ids=ALTERED.keys())
def test_a_manifest_altered_anywhere_that_matters_is_refused(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json has been altered"):
        open_split(folder, "train")


@pytest.mark.parametrize("what", ["shard", "shard of rows", "tokenizer"])
@pytest.mark.parametrize("name", ["../outside", "{outside}", "sub/../../outside", "..", "", None])
def test_a_manifest_that_names_a_file_outside_is_refused(folder, tmp_path_factory, what, name):
    """Risk: a folder from a stranger has us train on a file of ours, which the model then repeats."""
    outside = folder.parent / "outside"
    outside.write_bytes((folder / ("tokenizer.json" if what == "tokenizer" else "train-00000.bin")).read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["tokenizer"] if what == "tokenizer" else manifest["splits"]["train"]["shards"][0]
    entry["file"] = name and name.format(outside=outside)
    if what == "shard of rows":  # as those of a Megatron index, which was not given
        manifest["splits"]["train"]["row_tokens"] = 5
    sign(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for verify in ("full", "sizes"):
        with pytest.raises(UserError, match=r"manifest\.json names the file .* which is not inside"):
            open_split(folder, "train", verify)


@pytest.mark.parametrize("name", ["train-00001.bin", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused_by_name(folder, tmp_path_factory, name):
    """Risk: a name inside the folder is a link to a file of ours, and the model is trained on it."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.move(folder / name, elsewhere / name)
    for target in (elsewhere / name, f"../{os.path.relpath(elsewhere / name, folder.parent)}"):
        (folder / name).symlink_to(target)
        for verify in ("full", "sizes"):
            with pytest.raises(
                UserError, match=rf"{name} leads out of .*; remove the link, or put a copy in its place"
            ):
                open_split(folder, "train", verify)
        (folder / name).unlink()
    (folder / name).symlink_to("gone")
    with pytest.raises(UserError, match=rf"{name} is a link to nothing that can be read"):
        open_split(folder, "train")


def test_links_inside_the_folder_and_into_the_cache_of_the_hub_are_read(folder, tmp_path_factory, monkeypatch):
    """Risk: a downloaded folder, all links, cannot be trained on; or one that is a link to another disk."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    expected = open_split(folder, "train").read(0, TOKENS)
    (cache / "datasets--org--x" / "blobs").mkdir(parents=True)
    for name in ("train-00000.bin", "tokenizer.json"):
        shutil.move(folder / name, cache / "datasets--org--x" / "blobs" / name)
        (folder / name).symlink_to(cache / "datasets--org--x" / "blobs" / name)
    (folder / "parts").mkdir()
    shutil.move(folder / "train-00001.bin", folder / "parts" / "1")
    (folder / "train-00001.bin").symlink_to("parts/1")
    (cache.parent / "linked").symlink_to(folder)
    assert np.array_equal(open_split(cache.parent / "linked", "train").read(0, TOKENS), expected)


@pytest.mark.parametrize(("dtype", "token_id"), [("uint16", 2500), ("uint16", 65535), ("int32", -1), ("int64", 2**40)])
@pytest.mark.parametrize("place", [0, 1499])
def test_an_id_that_is_not_in_the_vocabulary_is_found_where_it_is(folder, dtype, token_id, place):
    """Risk: a folder that is consistent in itself ends training in a traceback, hours in."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for split in manifest["splits"].values():
        split["dtype"] = dtype
        for number, shard in enumerate(split["shards"]):
            file = folder / shard["file"]
            ids = np.arange(number * SHARD, number * SHARD + shard["tokens"]).astype(np.dtype(dtype).newbyteorder("<"))
            if file.name == f"train-{place // SHARD:05d}.bin":
                ids[place % SHARD] = token_id
            file.write_bytes(ids.tobytes())
            shard["sha256"] = hashlib.sha256(ids.tobytes()).hexdigest()
    sign(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    shard, inside = divmod(place, SHARD)
    message = (
        rf"train-{shard:05d}\.bin holds the id {token_id} at token {inside}, but its tokenizer has the ids 0 to 2499"
    )
    with pytest.raises(UserError, match=message):
        open_split(folder, "train")
    split = open_split(folder, "train", verify="sizes")
    with pytest.raises(UserError, match=message) as caught:
        split.read(0, TOKENS)
    assert caught.value.any_rank, "of several ranks one alone reads it"
    assert split.read(place + 1, 500).tolist() == list(range(place + 1, place + 501))
