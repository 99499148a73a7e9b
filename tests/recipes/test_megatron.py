"""Guards: Pythia's pre-shuffled rows are read in their order, from their own files, and only if they are whole."""

import struct

import numpy as np
import pytest

from recipes import prepare
from recipes.data.local_files import LocalFiles
from recipes.data.megatron import find_parts, read_index
from recipes.data.shards import open_split
from sinkmodel.errors import UserError
from tests.recipes.corpus import make_texts, write_lines, write_tokenizer

ROWS, ROW = 7, 2049


def write_pair(folder, parts=1, code=8, dtype="<u2", ids=None, lengths=None):
    """As Megatron writes it; independent of the reader."""
    if ids is None:
        ids = np.random.default_rng(0).integers(0, 400, (ROWS, ROW))
    content = np.asarray(ids).astype(dtype).tobytes()
    itemsize = np.dtype(dtype).itemsize
    lengths = np.full(ROWS, ROW) if lengths is None else np.asarray(lengths)
    places = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * itemsize
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, ROWS, ROWS + 1)
    tail = (
        lengths.astype("<i4").tobytes() + places.astype("<i8").tobytes() + np.arange(ROWS + 1).astype("<i8").tobytes()
    )
    (folder / "document.idx").write_bytes(header + tail)
    if parts == 1:
        (folder / "document.bin").write_bytes(content)
    else:
        size = len(content) // parts // itemsize * itemsize + itemsize  # parts end within rows, as Pythia's do
        for number in range(parts):
            name = f"document-{number:05d}-of-{parts - 1:05d}.bin"
            (folder / name).write_bytes(content[number * size : (number + 1) * size])
    return ids


@pytest.mark.parametrize(("parts", "code", "dtype"), [(1, 8, "<u2"), (3, 8, "<u2"), (3, 4, "<i4")])
def test_rows_come_back_in_the_order_given_without_a_copy(tmp_path, parts, code, dtype):
    source = tmp_path / "source"
    source.mkdir()
    ids = write_pair(source, parts, code, dtype)
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    argv = ["--input", str(source / "document.idx"), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "out")]
    assert prepare.main(argv) == 0
    split = open_split(tmp_path / "out", "train")
    assert (split.tokens, split.row_tokens, split.documents) == (ROWS * ROW, ROW, int((ids == 0).sum()))
    for row in range(ROWS):
        assert split.read(row * ROW, ROW).tolist() == ids[row].tolist()
    assert not list((tmp_path / "out").glob("*.bin"))
    assert prepare.main(argv) == 0  # complete already
    lost = tmp_path / "out" / "manifest.json"
    manifest = lost.read_text()
    lost.write_text(manifest.replace(str(source), "../source"))
    with pytest.raises(UserError, match="which is not inside"):  # the rows lie elsewhere, by their whole path alone
        open_split(tmp_path / "out", "train")
    lost.write_text(manifest)
    part = sorted(source.glob("*.bin"))[-1]
    part.write_bytes(part.read_bytes()[:-2] + b"\x01\x00")
    with pytest.raises(UserError, match=f"{part.name} has been altered"):
        open_split(tmp_path / "out", "train")


def test_held_out_text_may_stand_beside_the_rows(tmp_path):
    write_pair(tmp_path)
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    text = write_lines(tmp_path / "v.jsonl", make_texts(3, 500))
    argv = ["--input", str(tmp_path / "document.idx"), "--validation-input", str(text), "--workers", "1"]
    assert prepare.main([*argv, "--tokenizer", str(tokenizer), "--output", str(tmp_path / "out")]) == 0
    assert open_split(tmp_path / "out", "train").row_tokens == ROW
    validation = open_split(tmp_path / "out", "validation")
    assert (validation.row_tokens, validation.documents) == (None, 3)


@pytest.mark.parametrize(
    "given",
    [
        ["document.bin"],
        ["document-00000-of-00002.bin", "document-00001-of-00002.bin", "document-00002-of-00002.bin"],
        ["document-*-of-00002.bin"],
        ["document"],
        ["document.idx", "other.idx"],
        ["document.idx", "a.txt"],
        ["a.txt", "document.idx"],
        ["*.idx"],
        ["docu*"],
        ["."],
        [".", "a.txt"],
    ],
    ids=" ".join,
)
def test_whatever_is_given_of_megatron_data_leads_to_its_index(tmp_path, given, capsys, monkeypatch):
    """Risk: "is no text file", for people whose other tools take the prefix or the .bin."""
    (tmp_path / "source").mkdir()
    monkeypatch.chdir(tmp_path / "source")
    write_pair(tmp_path / "source", 3 if "-" in given[0] else 1)
    if "other.idx" in given:
        (tmp_path / "source" / "other.idx").write_bytes((tmp_path / "source" / "document.idx").read_bytes())
    if "a.txt" in given:
        (tmp_path / "source" / "a.txt").write_text("text")
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    argv = ["--input", *given, "--tokenizer", str(tokenizer), "--output", str(tmp_path / "out")]
    assert prepare.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith("give only the .idx file, beside which its .bin files are found: --input document.idx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["validation_input", "test_input"])
@pytest.mark.parametrize("given", ["document.idx", "document.bin", "document", ".", "beside"])
def test_held_out_data_must_be_text(tmp_path, option, given, capsys, monkeypatch):
    """Risk: the remedy is to train on what was to be held out."""
    for folder in (tmp_path / "source", tmp_path / "source" / "beside"):
        folder.mkdir()
        write_pair(folder)
    (tmp_path / "source" / "beside" / "README.txt").write_text("about it")
    monkeypatch.chdir(tmp_path / "source")
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    argv = ["--input", "document.idx", f"--{option}", given, "--tokenizer", str(tokenizer)]
    assert prepare.main([*argv, "--output", str(tmp_path / "out")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.endswith(f"{option} must be text, even if input is an .idx: give text files")
    assert "--input" not in error
    assert not (tmp_path / "out").exists()


def test_text_beside_megatron_data_is_read_if_it_is_named(tmp_path):
    """Risk: a folder of terabytes is prepared from its README alone."""
    write_pair(tmp_path)
    (tmp_path / "document.txt").write_text("text")
    for name in ("document.txt", "*.txt"):
        assert LocalFiles([str(tmp_path / name)], "text").paths == [tmp_path / "document.txt"]
    for name in (".", "*", "document*"):
        with pytest.raises(
            UserError, match=r"holds both text \(as document.txt\) and .*; for the text, name its files"
        ):
            LocalFiles([str(tmp_path / name)], "text")


@pytest.mark.parametrize("name", ["lone.bin", "lone-00000-of-00001.bin", "lone*.bin"])
def test_a_bin_without_its_index_is_not_sent_to_a_file_that_is_not_there(tmp_path, name):
    (tmp_path / name.replace("*", "")).write_bytes(b"\x01\x02")
    with pytest.raises(UserError, match=r"is not text; as Megatron data it needs lone\*?.idx beside it, .* missing"):
        LocalFiles([str(tmp_path / name)], "text")
    for gone in ("gone.bin", "gone.idx"):
        with pytest.raises(UserError, match=f"{gone} does not exist"):
            LocalFiles([str(tmp_path / gone)], "text")


def test_ids_beyond_the_tokenizer_are_refused(tmp_path, capsys):
    ids = np.zeros((ROWS, ROW), dtype=int)
    ids[5, 9] = 400
    write_pair(tmp_path, ids=ids)
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    argv = ["--input", str(tmp_path / "document.idx"), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "out")]
    assert prepare.main(argv) == 2
    assert "holds the id 400, but the tokenizer has 400 ids" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_not_whole_is_named(tmp_path):
    with pytest.raises(UserError, match=r"document.idx does not exist"):
        read_index(tmp_path / "document.idx")
    write_pair(tmp_path, parts=3)
    index = read_index(tmp_path / "document.idx")
    assert len(find_parts(tmp_path / "document.idx", index)) == 3
    last = tmp_path / "document-00002-of-00002.bin"
    content = last.read_bytes()
    last.write_bytes(content[:-2])
    with pytest.raises(UserError, match="one is missing, cut short"):
        find_parts(tmp_path / "document.idx", index)
    last.write_bytes(content)
    (tmp_path / "document-00001-of-00002.bin").unlink()
    with pytest.raises(UserError, match="part 1 of document"):
        find_parts(tmp_path / "document.idx", index)
    whole = (tmp_path / "document.idx").read_bytes()
    for damaged, message in (
        (whole[:-1], "cut short or damaged"),
        (b"x" + whole[1:], "not a Megatron index"),
        (whole[:17] + b"\x63" + whole[18:], "data type 99"),
    ):
        (tmp_path / "document.idx").write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            read_index(tmp_path / "document.idx")
    write_pair(tmp_path, lengths=[ROW] * (ROWS - 1) + [5])
    with pytest.raises(UserError, match="rows of different lengths"):
        read_index(tmp_path / "document.idx")
