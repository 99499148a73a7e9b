"""Guards: what is wrong with a data set is named with its file and column; "again" is advised only if it may help."""

import gzip
import json
import logging
import lzma
import os
import re
import zipfile
from pathlib import Path

import httpx
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from huggingface_hub.errors import HfHubHTTPError

from recipes import prepare
from recipes.data import preparation
from recipes.data.errors import STAY, dataset_error, may_pass
from recipes.data.hub_dataset import HubDataset
from sinkmodel.errors import UserError
from tests.recipes.corpus import make_texts, write_lines, write_tokenizer

TEXTS = make_texts(30, 60)
AGAIN = "run the same command again"


def cut(packed):
    return packed[: len(packed) // 2]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(table, file):
    pyarrow.parquet.write_table(pyarrow.table(table), file)
    return file.read_bytes()


def latin1_parquet(file):
    values = pyarrow.array([b"fine", b"caf\xe9"])
    return parquet({"text": pyarrow.Array.from_buffers(pyarrow.string(), 2, values.buffers())}, file)


def zipped(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", lines([{"text": "a"}]))
        archive.writestr("b.jsonl", lines([{"body": "b"}]))
    return file.read_bytes()


LONG = [{"text": os.urandom(2000).hex()} for _ in range(200)]
# The second file of a data set, its content, and what has to be named besides it.
DAMAGE = {
    "other columns": ("1.jsonl", lambda f: lines([{"body": "x", "id": 1}]), "columns body, id, text, and the .* text;"),
    "one column more": ("1.jsonl", lambda f: lines([{"text": "x", "id": 1}]), "columns text, id, and the .* text;"),
    "Parquet of other columns": ("1.parquet", lambda f: parquet({"body": ["x"]}, f), "columns body, and"),
    "another type": ("1.jsonl", lambda f: lines([{"text": "x", "url": {"a": 1}}]), "column 'url' has another type"),
    "cut .gz": ("1.jsonl.gz", lambda f: cut(gzip.compress(lines(LONG))), "ended before"),
    "cut .zst": ("1.jsonl.zst", lambda f: cut(zstandard.compress(lines(LONG))), "the last frame has no end"),
    "cut Parquet": ("1.parquet", lambda f: cut(parquet({"text": TEXTS}, f)), "damaged"),
    "broken JSON": ("1.jsonl", lambda f: b'{"text": "a"}\n{"text": \n', "damaged or not of its format"),
    "a CSV with a bad row": ("1.csv", lambda f: b"text\na\nb,c,d\n", "line 3"),
    "Latin-1": (
        "1.jsonl",
        lambda f: b'{"text": "caf\xe9"}\n',
        r"train-1.jsonl is not UTF-8 .*: convert it .* iconv -f latin1 -t UTF-8 .*train-1.jsonl > utf8-train-1.jsonl$",
    ),
    "UTF-16": (
        "1.jsonl",
        lambda f: lines([{"text": "x"}]).decode().encode("utf-16"),
        "train-1.jsonl .*UTF-16.*: iconv -f UTF-16 -t UTF-8 .*train-1.jsonl > utf8-train-1.jsonl$",
    ),
    "UTF-16 in .gz": (
        "1.jsonl.gz",
        lambda f: gzip.compress(lines([{"text": "x"}]).decode().encode("utf-16-le")),
        "train-1.jsonl.gz .*UTF-16LE.*: gzip -dc .* iconv -f UTF-16LE -t UTF-8 > utf8-train-1.jsonl$",
    ),
    "Latin-1 as .txt": ("1.txt", lambda f: b"caf\xe9\n", "iconv -f latin1 -t UTF-8 .*train-1.txt > utf8-train-1.txt$"),
    "Latin-1 in Parquet": (
        "1.parquet",
        lambda f: latin1_parquet(f),
        "is not UTF-8 .*: repair that row, or write the file",
    ),
    "an archive": ("1.zip", zipped, r"\(b.jsonl\): it has the columns body, text"),
}


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """What the loggers of Hugging Face's libraries let through; their levels must be the same afterwards."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    import datasets  # noqa: F401  # sets the levels

    libraries = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [library.level for library in libraries]
    handler = logging.Handler()
    records = []
    handler.emit = records.append
    for library in libraries:
        library.addHandler(handler)
    yield records
    for library in libraries:
        library.removeHandler(handler)
    assert [library.level for library in libraries] == levels


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_with_its_file_and_never_to_be_tried_again(tmp_path, case, capsys, logged):
    """Risk: "Couldn't cast; run the same command again", for ever, about one of ten thousand files."""
    name, content, message = DAMAGE[case]
    folder = tmp_path / "set"
    folder.mkdir()
    file = folder / f"train-{name}"
    file.write_bytes(content(file))
    if name.endswith(".parquet"):
        parquet({"text": TEXTS}, folder / "train-0.parquet")
    elif case == "another type":
        (folder / "train-0.jsonl").write_bytes(lines([{"text": text, "url": 1} for text in TEXTS]))
    elif name.endswith((".jsonl", ".gz", ".zst")):
        write_lines(folder / "train-0.jsonl", TEXTS)
    write_tokenizer(tmp_path / "tokenizer.json")
    argv = ["--dataset", str(folder), "--tokenizer", str(tmp_path / "tokenizer.json"), "--workers", "1"]
    assert prepare.main([*argv, "--output", str(tmp_path / "out")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert not logged
    assert str(file) in error
    assert AGAIN not in error
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_data_is_one_line(tmp_path, capsys, logged):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "README.md").write_text("hi")
    argv = ["--dataset", str(tmp_path / "set"), "--vocabulary-size", "300", "--output", str(tmp_path / "out")]
    assert prepare.main(argv) == 2
    assert "doesn't contain any data files" in capsys.readouterr().err
    assert not logged


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_parquet_file_without_rows_adds_nothing(tmp_path, place, monkeypatch):
    """Risk: "BatchSize must be greater than 0", of a sound file as filters leave it."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    parquet({"text": TEXTS[:15]}, folder / "b.parquet")
    parquet({"text": TEXTS[15:]}, folder / "d.parquet")
    name = {"first": "a", "middle": "c", "last": "e"}[place]
    parquet({"text": pyarrow.array([], pyarrow.string())}, folder / f"{name}.parquet")
    assert ["".join(chunks) for _, chunks in HubDataset(str(folder), None, "train", "text").documents()] == TEXTS


def test_a_data_set_in_a_folder_says_that_its_files_must_stay(tmp_path, monkeypatch, capsys):
    """Risk: "mend it", which costs what was kept: the state of `datasets` does not survive another list of files."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    make_units = preparation.make_units
    monkeypatch.setattr(preparation, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(preparation, "make_units", lambda *a: make_units(*a, size=300))
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train-0.jsonl", TEXTS)
    (folder / "train-1.jsonl").write_text('{"text": \n')
    write_tokenizer(tmp_path / "tokenizer.json")
    argv = ["--dataset", str(folder), "--tokenizer", str(tmp_path / "tokenizer.json"), "--workers", "1"]
    argv += ["--output", str(tmp_path / "out")]
    assert prepare.main(argv) == 2
    stderr = capsys.readouterr().err
    assert "train-1.jsonl: damaged" in stderr
    assert f"choose another output folder, since {STAY}" in stderr
    (folder / "train-1.jsonl").write_text('{"text": "mended"}\n')
    assert prepare.main(argv) == 2
    assert f"from train-1.jsonl, which has been edited since; restore it, or choose another output folder ({STAY})" in (
        capsys.readouterr().err
    )
    (folder / "train-1.jsonl").unlink()
    assert prepare.main(argv) == 2
    assert "from train-1.jsonl, which has been removed since or is not given; " in capsys.readouterr().err


def test_what_there_is_instead_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for config in ("en", "de"):
        (tmp_path / config).mkdir()
        write_lines(tmp_path / config / "train.jsonl", TEXTS)
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("en", "de"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for config, split, key, message in [
        (None, "train", "text", r"pick one among the available configs: \['en', 'de'\].*check dataset"),
        ("fr", "train", "text", r"'fr' not found. Available: \['en', 'de'\]; check dataset, dataset_config"),
        ("en", "dev", "text", r"Bad split: dev. Available splits: \['train'\]; check dataset"),
        ("en", "train", "body", r"without text under 'body' \(there is text\); set text_key"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            list(HubDataset(str(tmp_path), config, split, key).documents())
        assert AGAIN not in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_row_without_text_is_left_out_and_counted(tmp_path, kind, monkeypatch):
    """Risk: a data set of a billion rows cannot be prepared for one null."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(HubDataset, "REMEMBER", 7)
    rows = [*TEXTS[:9], None, *TEXTS[9:20], "", " \n", *TEXTS[20:], None]
    folder = tmp_path / "set"
    folder.mkdir()
    if kind == "jsonl":
        (folder / "train.jsonl").write_bytes(lines([{"text": row} for row in rows]))
    else:
        parquet({"text": rows}, folder / "train.parquet")
    corpus = HubDataset(str(folder), None, "train", "text")
    documents = [(cursor, "".join(chunks)) for cursor, chunks in corpus.documents()]
    assert [text for _, text in documents] == TEXTS
    assert corpus.skipped == 4
    for number in (0, 8, 9, 25):
        again = HubDataset(str(folder), None, "train", "text").documents(documents[number][0])
        assert ["".join(chunks) for _, chunks in again] == TEXTS[number:]
    assert len([text for strand in corpus.strands() for text in strand]) == 30


@pytest.mark.parametrize("text", [7, ["a", "b"], {"en": "x"}])
def test_a_text_that_is_something_else_is_named_with_its_row(tmp_path, text, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "train.jsonl").write_bytes(lines([{"text": None}, {"text": text}]))
    with pytest.raises(UserError, match=f"row 2 has no text under 'text' but {type(text).__name__}"):
        list(HubDataset(str(tmp_path), None, "train", "text").documents())


def of_the_hub(status):
    return HfHubHTTPError("no", response=httpx.Response(status, request=httpx.Request("GET", "http://hub")))


def test_only_what_may_pass_by_itself_is_to_be_tried_again(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    passing = [ConnectionError("reset"), TimeoutError(), httpx.ReadTimeout("slow"), of_the_hub(503), of_the_hub(429)]
    lasting = [ValueError("cast"), EOFError("cut"), of_the_hub(404), of_the_hub(403), FileNotFoundError("none")]
    for errors, again in ((passing, True), (lasting, False)):
        for error in errors:
            wrapped = RuntimeError("while reading")
            wrapped.__cause__ = error
            for each in (error, wrapped):
                assert may_pass(each) == again, error
                assert (AGAIN in str(dataset_error("it", each, "check it"))) == again


def test_a_file_on_the_hub_is_named_but_is_in_no_command():
    """Risk: `iconv hf:/datasets/…`."""
    error = UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "unexpected end of data")
    file = "hf://datasets/org/set@main/train.jsonl"
    message = str(dataset_error("it", error, "check it", file))
    assert message.startswith(f"it: {file} is not UTF-8 (")
    assert message.endswith("iconv -f latin1 -t UTF-8")


@pytest.mark.parametrize("variable", ["HF_DATASETS_CACHE", "HF_HOME"])
def test_a_cache_that_cannot_be_written_is_named_with_the_variable_that_moves_it(tmp_path, variable, monkeypatch):
    """Risk: a read-only HOME is blamed on the network."""
    (tmp_path / "file").write_text("")
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", TEXTS)
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "file" / "x"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path(tmp_path / "file" / "x"))
    with pytest.raises(
        UserError, match=f"its cache {tmp_path}/file/x cannot be written .*; set {variable} to"
    ) as caught:
        list(HubDataset(str(tmp_path / "set"), None, "train", "text").documents())
    assert "network" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_every_stream_of_a_compressed_file_is_read(tmp_path, suffix, monkeypatch):
    """Risk: what `datasets` opens ends in silence at the padding of .xz, and at a damaged last frame of .zst."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    compress = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    first, second = (compress(lines([{"text": text} for text in part])) for part in (TEXTS[:9], TEXTS[9:]))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / f"train.jsonl{suffix}").write_bytes(first + (bytes(8) if suffix == ".xz" else b"") + second)
    corpus = HubDataset(str(folder), None, "train", "text")
    assert ["".join(chunks) for _, chunks in corpus.documents()] == TEXTS
    for cut in (3, len(second) - 9):
        (folder / f"train.jsonl{suffix}").write_bytes((first + second)[:-cut])
        with pytest.raises(UserError, match=f"train.jsonl{suffix}: damaged"):
            list(HubDataset(str(folder), None, "train", "text").documents())
