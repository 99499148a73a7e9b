"""Guards: documents come out as they were written, whatever the file; a bad file is named with its place."""

import gzip
import json
import lzma
import re
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from sinkmodel.errors import UserError
from sinkmodel.text import DocumentReader, content, find_text_files, read_documents, read_json_lines
from sinkmodel.text.search import find_json_lines, name_without_suffixes
from tests.recipes.corpus import make_texts

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
TEXTS = [*make_texts(5, 3000), "É 天 😀\r\nlast"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 7 bytes: lines and characters are cut everywhere."""
    monkeypatch.setattr(content, "BLOCK", 7)


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


PADDED = {".gz": 3, ".xz": 4}  # zero bytes that may follow a member or stream
SKIPPABLE = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"  # a zstd frame without text, as pzstd writes


def test_concatenated_frames_are_read_to_the_end(tmp_path):
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(compress(b"one ") + compress(b"two ") + compress(b"three"))
        assert list(read_documents(path)) == ["one two three"], suffix
    for suffix, size in PADDED.items():
        padding = bytes(size * 5)
        path = tmp_path / f"padded.txt{suffix}"
        path.write_bytes(padding.join([COMPRESS[suffix](b"one "), COMPRESS[suffix](b"two"), b""]))
        assert list(read_documents(path)) == ["one two"], suffix
    (tmp_path / "b.txt.zst").write_bytes(SKIPPABLE + COMPRESS[".zst"](b"one ") + SKIPPABLE + COMPRESS[".zst"](b"two"))
    assert list(read_documents(tmp_path / "b.txt.zst")) == ["one two"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_no_byte_after_the_first_stream_is_lost_without_an_error(tmp_path, suffix):
    """Cut anywhere, damaged anywhere, or followed by rubbish: all of the text, or one line that names the file."""
    first, second = COMPRESS[suffix](b"one " * 9), COMPRESS[suffix](b"two " * 9)
    path = tmp_path / f"a.txt{suffix}"

    def read(content):
        path.write_bytes(content)
        try:
            return "".join(read_documents(path))
        except UserError as error:
            return str(error)

    bad = re.compile(rf".*a.txt{suffix} is (truncated or damaged|not UTF-8 .* check it with \w+ -t)")
    whole = read(first + second)
    assert whole == "one " * 9 + "two " * 9
    for end in range(len(first) + 1, len(first + second)):
        assert bad.match(read((first + second)[:end])), end
    for at in range(len(second)):
        broken = bytearray(first + second)
        broken[len(first) + at] ^= 0xFF
        assert (given := read(bytes(broken))) == whole or bad.match(given), at
    for rubbish in (b"x", b"rubbish" * 9, b"\0\0\0x", first[:1], *([b"\0"] if suffix == ".xz" else [])):
        assert bad.match(read(first + second + rubbish)), rubbish


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


def test_a_folder_gives_its_text_files_by_name_and_says_what_it_left_out(tmp_path):
    for name in ("b.txt", "a/c.jsonl.zst", "a/.hidden.txt", "notes.md", "x.parquet.gz", "d.txt.gz", "y.csv", "z.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "lost.csv").symlink_to("nowhere")
    for pattern in ("", "/*", "/**"):
        found = find_text_files(f"{tmp_path}{pattern}")
        names = [str(path.relative_to(tmp_path)) for path in found.files]
        assert names == ["a/c.jsonl.zst", "b.txt", "d.txt.gz"], pattern
        assert found.summary() == (".csv: lost.csv, y.csv, z.csv; .md: notes.md; .parquet.gz: x.parquet.gz"), pattern


def test_linked_files_go_by_their_own_name_and_linked_folders_are_read_once(tmp_path):
    """The Hub's cache and DVC link train.parquet to a file whose name is a checksum."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    for folder in (blobs, snapshot, tmp_path / "more"):
        folder.mkdir()
    (blobs / "e3b0").write_text('{"text": "from a blob"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["from parquet"]}), blobs / "9f86")
    (tmp_path / "more" / "c.txt").write_text("from a linked folder")
    (snapshot / "a.jsonl").symlink_to("../blobs/e3b0")
    (snapshot / "b.parquet").symlink_to("../blobs/9f86")
    (snapshot / "more").symlink_to("../more")
    (snapshot / "again").symlink_to(".")
    expected = ["from a blob", "from parquet", "from a linked folder"]
    for name in (snapshot, snapshot / "*"):
        found = find_text_files(str(name)).files
        assert len(found) <= 6  # however long the way through `again` is
        read = {path.resolve(): "".join(read_documents(path)) for path in found}
        assert list(read.values()) == expected, name
    (tmp_path / "name").symlink_to("more/c.txt")
    assert list(read_documents(tmp_path / "name")) == ["from a linked folder"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_and_ndjson_are_json_lines(tmp_path, suffix):
    """C4 and Dolma come as .json.gz. Settings in JSON beside them are not text, and are named."""
    for name in ("a.json", "b.ndjson"):
        (tmp_path / f"{name}{suffix}").write_bytes(COMPRESS[suffix](GOOD + GOOD))
        assert list(read_documents(tmp_path / f"{name}{suffix}")) == ["good", "good"]
    (tmp_path / f"array.json{suffix}").write_bytes(COMPRESS[suffix](b'[{"text": "x"}]'))
    (tmp_path / f"pretty.json{suffix}").write_bytes(COMPRESS[suffix](b'{\n  "text": "x"\n}\n'))
    (tmp_path / f"blank.json{suffix}").write_bytes(COMPRESS[suffix](b"\n"))
    found = find_text_files(str(tmp_path))
    assert [path.name for path in found.files] == [f"{name}{suffix}" for name in ("a.json", "b.ndjson", "blank.json")]
    assert found.summary() == f".json{suffix} (not lines of text): array.json{suffix}, pretty.json{suffix}"


def test_rows_without_text_are_passed_over_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n\n{"text": "a"}\n{"text": " "}\n{"text": ""}\n{"text": "b"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": [None, "a", " ", "", "b"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        reader = DocumentReader(tmp_path / name)
        assert ["".join(pieces) for _, pieces in reader.documents()] == ["a", "b"]
        assert reader.skipped == 3


def test_parquet_parts_by_their_values(tmp_path):
    """A part without rows may have any columns, one of nulls any type; bytes are text; a list is not."""

    def read(column):
        pyarrow.parquet.write_table(pyarrow.table(column), tmp_path / "a.parquet")
        reader = DocumentReader(tmp_path / "a.parquet")
        return ["".join(pieces) for _, pieces in reader.documents()]

    for empty in ({}, {"x": pyarrow.array([], "int64")}, {"text": pyarrow.array([None, None], pyarrow.float64())}):
        with pytest.raises(UserError, match="holds no text"):
            read(empty)
    assert read({"text": ["é".encode(), None, b"b"]}) == ["é", "b"]
    with pytest.raises(UserError, match="row 2 is not UTF-8"):
        read({"text": [b"a", b"\xff"]})
    for values in ([None, 1.5], [None, ["a"]], [None, {"a": "b"}]):
        with pytest.raises(UserError, match="row 2 of the column 'text' holds .*, not text"):
            read({"text": values})


def test_a_json_file_with_a_bad_first_line_is_no_other_form_of_json(tmp_path):
    """Risk: a damaged or Latin-1 file of a folder is left out as if it were settings."""
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    for lines in (b'{"text": "caf\xe9"}\n' + GOOD, b'{"text": "cut\n' + GOOD, b"text\n"):
        (tmp_path / "a.json").write_bytes(lines)
        with pytest.raises(UserError, match=r"a\.json"):
            find_text_files(str(tmp_path))


def test_marks_of_files_that_were_joined_are_no_part_of_a_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b"\xef\xbb\xbf" + GOOD)
    assert list(read_documents(tmp_path / "a.jsonl")) == ["good", "good"]


def test_a_parquet_row_that_is_not_utf8_is_named(tmp_path):
    rows = [b"good"] * 600 + [b"caf\xe9 au lait"]
    texts = pyarrow.array(rows, pyarrow.binary()).cast(pyarrow.string(), safe=False)
    table = pyarrow.Table.from_arrays([pyarrow.array(rows, pyarrow.binary()).view(pyarrow.string())], ["text"])
    assert texts.type == table.column("text").type
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: row 601 is not UTF-8 at byte 3 "):
        list(read_documents(tmp_path / "a.parquet"))


@pytest.mark.parametrize("text", ["Windows says\r\n", "Он сказал ей:\r\n", "他说了\r\n", "é\r\n"])
@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_is_recognised_and_the_advice_converts_it(tmp_path, monkeypatch, encoding, mark, text):
    """Much of UTF-16 decodes as UTF-8, and all of it as Latin-1: full of zero characters."""
    monkeypatch.undo()  # blocks of their usual size
    raw = ("\ufeff" * mark + text * 20).encode(encoding)
    for name in ("it's a.txt", "a.jsonl"):
        path = tmp_path / name
        path.write_bytes(raw if name.endswith("txt") else ("\ufeff" * mark + '{"text": "x"}\n' * 9).encode(encoding))
        with pytest.raises(UserError, match="is not UTF-8") as caught:
            list(read_documents(path))
        assert "it is UTF-16" in str(caught.value)
        assert "latin1" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        list(read_documents(tmp_path / "it's a.txt"))
    subprocess.run(str(caught.value).partition("convert it first: ")[2], shell=True, check=True, cwd=tmp_path)
    assert list(read_documents(tmp_path / "utf8-it's a.txt")) == [text.replace("\r\n", "\n") * 20]


CHINESE = "一九八四年的春天，　他说了一句话。" + "".join(map(chr, range(0x4E00, 0x9FA0, 37)))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("lines", ["", "\n"])
def test_every_script_in_utf16_is_recognised(tmp_path, monkeypatch, encoding, lines):
    """一 and the ideographic blank have a zero byte on the other side; without a line end there is no other."""
    monkeypatch.undo()
    line = CHINESE + lines
    for name, text in (("a.txt", line[20:] * 9 + line), ("a.jsonl", f'{{"text": "{CHINESE}"}}\n' * 9)):
        (tmp_path / name).write_bytes(text.encode(encoding))
        with pytest.raises(UserError) as caught:
            list(read_documents(tmp_path / name))
        command = str(caught.value).partition("convert it first: ")[2]
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert (tmp_path / f"utf8-{name}").read_text(encoding="utf-8") == text, caught.value


def test_utf16_after_utf8_is_recognised(tmp_path, monkeypatch):
    """As PowerShell's >> leaves it: a few zero bytes in a large block."""
    monkeypatch.undo()
    (tmp_path / "a.txt").write_bytes(b"zero \0 " + b"plain text\n" * 50_000 + "more\r\n".encode("utf-16-le") * 300)
    with pytest.raises(UserError, match="is not UTF-8 from byte 550007 on: UTF-16 follows other text there"):
        list(read_documents(tmp_path / "a.txt"))
    for text in (b"plain text\n" * 50_000 + b"\0", b"ab\0"):
        (tmp_path / "b.txt").write_bytes(text)
        assert list(read_documents(tmp_path / "b.txt")) == [text.decode()], "a zero byte or two do no harm"


def test_a_text_may_begin_with_the_letters_of_a_file_format(tmp_path):
    for text in ("PAR1 is how it begins", "BZhang wrote this", "%PDF is a format"):
        (tmp_path / "a.txt").write_text(text)
        assert list(read_documents(tmp_path / "a.txt")) == [text]


@pytest.mark.parametrize("words", ["café au lait, ", "à la carte\n", "ÄÖÜß\n"])
def test_latin1_is_called_that_and_the_advice_converts_it(tmp_path, monkeypatch, words):
    monkeypatch.undo()
    (tmp_path / "a.txt").write_bytes((words * 99).encode("latin1"))
    with pytest.raises(UserError, match="if it is Latin-1, with: ") as caught:
        list(read_documents(tmp_path / "a.txt"))
    subprocess.run(str(caught.value).partition("with: ")[2], shell=True, check=True, cwd=tmp_path)
    assert list(read_documents(tmp_path / "utf8-a.txt")) == [words * 99]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (gzip.compress(b"x", mtime=0), "compressed with gzip; rename it to end in .gz"),
        (lzma.compress(b"x"), "compressed with xz"),
        (b"PK\x03\x04\xff", "a ZIP archive"),
        (b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n" + b"1 0 obj\n" * 99, "is a PDF; extract its text"),
        (b"text" + bytes(100), "has zero bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "Git LFS has not fetched"),
        (bytes(range(1, 256)) * 9, "it is not text"),
        ("text".encode("utf-32"), "it is UTF-32"),
    ],
)
def test_what_is_not_text_is_not_called_latin1(tmp_path, content, expected, monkeypatch):
    monkeypatch.undo()  # blocks of their usual size
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        list(read_documents(tmp_path / "a.txt"))


def test_a_separator_divides_a_text_file_wherever_its_blocks_end(tmp_path, monkeypatch):
    """Rows are counted from the beginning of the file; line breaks beside a separator belong to no document."""
    mark = "<|endoftext|>"
    stories = ["one\n\ntwo", "é 天", " \t", "three " * 9, "", "four"]
    path = tmp_path / "a.txt"
    path.write_text(f"\n{mark}\n".join(stories) + f"\n{mark}\n", encoding="utf-8")
    expected = [(row, story) for row, story in enumerate(stories) if story.strip()]
    for block in (3, 7, 16, 1000):
        monkeypatch.setattr(content, "BLOCK", block)
        for skip in range(len(stories) + 1):
            reader = DocumentReader(path, separator=mark)
            read = [(row, "".join(pieces)) for row, pieces in reader.documents(skip)]
            assert read == expected[sum(row < skip for row, _ in expected) :], (block, skip)
    half = DocumentReader(path, separator=mark).documents()
    assert [(row, next(iter(pieces))[:1]) for row, pieces in half] == [(row, story[:1]) for row, story in expected]


def test_a_text_file_that_seems_to_hold_several_documents_is_reported(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n")
    assert list(read_documents(tmp_path / "a.txt")) == ["one\n<|endoftext|>\ntwo\n"]
    assert "a.txt is read as one document" in (line := capsys.readouterr().err)
    assert line.count("\n") == 1
    assert "--separator '<|endoftext|>'" in line


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
    "null.jsonl": (b'{"text": null}\n', "holds no text"),
    "number.jsonl": (GOOD + b'{"text": 7}\n', ":2: the key 'text' holds a number, not text"),
    "list.jsonl": (b"[1]\n", ":1: not a JSON object; write one object per line with: jq -c '.[]'"),
    "indented.json": (b'{\n "text": "x"\n}\n', ":1: not a JSON object"),
    "a.parquet": (b"PAR1 nothing of the kind", "not a valid Parquet file"),
    "a.docx": (b"x", "is not a text file"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 9)[:-9], "truncated or damaged"),
    "cut.jsonl.xz": (lzma.compress(GOOD * 9)[:-9], "truncated or damaged"),
    "cut.jsonl.zst": (COMPRESS[".zst"](GOOD * 9)[:-3], "truncated or damaged"),
    "not.txt.gz": (b"plain text", "truncated or damaged"),
    "not.txt.xz": (b"plain text", "truncated or damaged"),
    "not.txt.zst": (b"plain text", "truncated or damaged"),
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


def test_task_folders_take_every_form_of_json_lines(tmp_path):
    for name in ("a.jsonl", "b.x.ndjson.gz", "c.json", "notes.md", "settings.json"):
        content = b"{\n}" if name.startswith("settings") else GOOD
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = find_json_lines(tmp_path)
    assert [name_without_suffixes(path) for path in found.files] == ["a", "b.x", "c"]
    assert [list(read_json_lines(path)) for path in found.files] == [[(1, {"text": "good"})]] * 3
    assert found.summary() == ".json (not lines of text): settings.json; .md: notes.md"
