"""Guards: a corpus gives the same documents in the same order, and resumes from any cursor."""

import sys
from itertools import islice

import pyarrow
import pyarrow.parquet
import pytest

from recipes.data.hub_dataset import HubDataset
from recipes.data.local_files import LocalFiles
from recipes.demo.king_james import KingJames
from sinkmodel.errors import UserError
from tests.recipes.corpus import make_texts, write_lines


def read(corpus, cursor=None):
    return [(at, "".join(chunks)) for at, chunks in corpus.documents(cursor)]


def test_files_folders_and_patterns_are_read_once_in_the_order_given(tmp_path):
    for name in ("z", "folder/b", "folder/a", "many1", "many2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(3)])
    names = ["z.jsonl", "folder", "many*.jsonl", "folder/a.jsonl"]
    corpus = LocalFiles([str(tmp_path / name) for name in names], "text")
    documents = read(corpus)
    expected = [f"{name} {i}" for name in ("z", "folder/a", "folder/b", "many1", "many2") for i in range(3)]
    assert [text for _, text in documents] == expected
    assert corpus.fraction() == 1.0
    for number, (cursor, _) in enumerate(documents):
        assert read(corpus, cursor) == documents[number:]


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.txt", "does not exist"), ("x*.txt", "matches no"), ("empty", "holds no"), ("a.pdf", "is not a text file")],
)
def test_a_name_without_text_is_an_error(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(UserError, match=message) as caught:
        LocalFiles([str(tmp_path / name)], "text")
    assert name in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_data_set_goes_on_from_any_cursor(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(HubDataset, "REMEMBER", 7)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    texts = make_texts(60, 50)
    (tmp_path / "set").mkdir()
    for number in range(3):
        part = texts[number * 20 : (number + 1) * 20]
        file = tmp_path / "set" / f"train-{number}.{kind}"
        if kind == "jsonl":
            write_lines(file, part)
        else:
            pyarrow.parquet.write_table(pyarrow.table({"text": part}), file, row_group_size=6)
    corpus = HubDataset(str(tmp_path / "set"), None, "train", "text")
    documents = read(corpus)
    assert [text for _, text in documents] == texts
    assert any(cursor["state"] for cursor, _ in documents)
    for number in (0, 1, 6, 7, 8, 19, 20, 33, 59):
        again = read(HubDataset(str(tmp_path / "set"), None, "train", "text"), documents[number][0])
        assert [(cursor["row"], text) for cursor, text in again] == list(enumerate(texts))[number:]
        later = min(9, len(again) - 1)  # a resumed run is killed too
        once_more = read(HubDataset(str(tmp_path / "set"), None, "train", "text"), again[later][0])
        assert [text for _, text in once_more] == texts[number + later :]
    with pytest.raises(UserError, match="split nothing\\) cannot be opened"):
        read(HubDataset(str(tmp_path / "set"), None, "nothing", "text"))
    with pytest.raises(UserError, match=r"without text under 'body' \(there is text\); set text_key"):
        read(HubDataset(str(tmp_path / "set"), None, "train", "body"))


def test_a_data_set_in_a_folder_is_another_when_a_file_of_it_is_edited(tmp_path):
    for number in range(2):
        write_lines(tmp_path / f"train-{number}.jsonl", make_texts(5, 50, seed=number))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "etag").write_text("what a download leaves")
    corpus = HubDataset(str(tmp_path), None, "train", "text")
    before = corpus.identity()
    assert [name for name, _, _ in before["files"]] == ["train-0.jsonl", "train-1.jsonl"]
    assert corpus.identity() == before
    write_lines(tmp_path / "train-1.jsonl", make_texts(5, 50, seed=1)[::-1])
    after = HubDataset(str(tmp_path), None, "train", "text").identity()
    assert after["files"][0] == before["files"][0]
    assert after["files"][1][:2] == before["files"][1][:2]  # of the same size
    assert after != before


def test_the_demo_corpus_is_66_books_of_clean_english_and_runs_no_code_of_the_wheel():
    for name in [name for name in sys.modules if name.startswith("pythonbible")]:
        del sys.modules[name]
    books = [text for _, text in read(KingJames())]
    assert not [name for name in sys.modules if name.startswith("pythonbible")]
    assert len(books) == 66
    assert sum(map(len, books)) > 4_000_000
    assert books[0].startswith("In the beginning God created the heaven and the earth.")
    assert books[1].startswith("Now these are the names of the children of Israel")
    assert books[-1].endswith("be with you all. Amen.\n")
    assert all(line == line.strip() and line for book in books for line in book[:-1].split("\n"))
    assert not set("[]") & set("".join(books))
    assert read(KingJames(), 64) == list(islice(read(KingJames()), 64, None))
