"""Guards: documents come out as they were written, whatever the file; a bad file is named with its place."""

import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

import sinkmodel.text
from sinkmodel.errors import UserError
from sinkmodel.text import DocumentReader, read_documents, text_files
from tests.recipes.corpus import make_texts

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
TEXTS = [*make_texts(5, 3000), "É 天 😀\r\nlast"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 7 bytes: lines and characters are cut everywhere."""
    monkeypatch.setattr(sinkmodel.text, "BLOCK", 7)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines_survive_every_compression(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    lines = "\n".join(json.dumps({"n": 1, "text": text}, ensure_ascii=bool(n % 2)) for n, text in enumerate(TEXTS))
    path.write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf" + lines.encode()))
    assert list(read_documents(path)) == TEXTS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_text_file_is_one_document_as_python_reads_it(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf" + "".join(TEXTS).encode()))
    assert list(read_documents(path)) == ["".join(TEXTS).replace("\r\n", "\n")]


def test_concatenated_frames_are_read_to_the_end(tmp_path):
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(compress(b"one ") + compress(b"two"))
        assert list(read_documents(path)) == ["one two"], suffix


def test_parquet_by_row_group_and_from_any_row(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"text {i}" if i % 7 else " " for i in range(1000)]
    pyarrow.parquet.write_table(pyarrow.table({"body": texts, "x": list(range(1000))}), path, row_group_size=64)
    everything = [(row, "".join(text)) for row, text in DocumentReader(path, "body").documents()]
    assert everything == [(row, text) for row, text in enumerate(texts) if text.strip()]
    for skip in (1, 63, 64, 500, 999):
        rest = [(row, "".join(text)) for row, text in DocumentReader(path, "body").documents(skip)]
        assert rest == [document for document in everything if document[0] >= skip]


def test_json_lines_go_on_from_any_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": t}) for t in ["a", "", "b", "c"]))
    everything = [(row, "".join(text)) for row, text in DocumentReader(path).documents()]
    assert [text for _, text in everything] == ["a", "b", "c"]
    for skip in range(8):
        rest = [(row, "".join(text)) for row, text in DocumentReader(path).documents(skip)]
        assert rest == [document for document in everything if document[0] >= skip]


def test_half_a_surrogate_pair_is_no_character(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83d b \\ud83d\\ude00"}\n')
    assert list(read_documents(path)) == ["a\ufffd b 😀"]


def test_a_folder_gives_its_text_files_by_name(tmp_path):
    for name in ("b.txt", "a/c.jsonl.zst", "a/.hidden.txt", "notes.md", "x.parquet.gz", "d.txt.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [str(path.relative_to(tmp_path)) for path in text_files(tmp_path)] == ["a/c.jsonl.zst", "b.txt", "d.txt.gz"]


GOOD = b'{"text": "good"}\n'
BAD = {
    "latin.txt": (b"caf\xe9 au lait", "at byte 3 "),
    "late.txt": (b"\xef\xbb\xbf" + "é".encode() * 20 + b"\xff", "at byte 43 "),
    "cut.txt": (b"ab\xe5\xa4", "at byte 2 "),
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \n \n", "holds no text"),
    "blank.jsonl": (b'\n{"text": " "}\n', "holds no text"),
    "bytes.jsonl": (GOOD + b'{"text": "\xff"}\n', "line 2"),
    "broken.jsonl": (GOOD + b'{"text": "x\n', ":2: not a JSON object"),
    "keyless.jsonl": (GOOD + GOOD + b'{"body": "x"}\n', ":3: no text under the key 'text' (there is body)"),
    "null.jsonl": (b'{"text": null}\n', ":1: no text"),
    "list.jsonl": (b"[1]\n", ":1: no text"),
    "a.parquet": (b"PAR1 nothing of the kind", "not a sound Parquet file"),
    "a.docx": (b"x", "is no text file"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 9)[:-9], "cut short or damaged"),
    "cut.jsonl.xz": (lzma.compress(GOOD * 9)[:-9], "cut short or damaged"),
    "cut.jsonl.zst": (COMPRESS[".zst"](GOOD * 9)[:-3], "cut short or damaged"),
    "not.txt.gz": (b"plain text", "cut short or damaged"),
    "not.txt.xz": (b"plain text", "cut short or damaged"),
    "not.txt.zst": (b"plain text", "cut short or damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_its_place_in_one_line(tmp_path, name):
    content, expected = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_documents(tmp_path / name))
    message = str(caught.value)
    assert expected in message
    assert name in message
    assert "\n" not in message


def test_a_parquet_file_without_the_column_says_which_there_are(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'text' \(there is body\); rename the text to 'text'"):
        list(read_documents(tmp_path / "a.parquet"))


def test_a_missing_file_is_told_at_once():
    with pytest.raises(UserError, match="does not exist"):
        read_documents(Path("nowhere.txt"))
