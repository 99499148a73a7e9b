"""Guards: the recall model's text has every kind of document, and every answer stands in its context."""

from __future__ import annotations

import json
import re
from random import Random

import pytest

from examples import recall_text
from examples.recall_text import COPY, MIXTURE, PROSE, main, make_document, read_books


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Sentences of different words, as many as the longest document takes."""
    rng = Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(4, 9))) for _ in range(4000)]
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(" ".join(" ".join(rng.sample(words, 12)).capitalize() + "." for _ in range(200)), encoding="utf-8")
    return path


ANSWERS = {"verbatim": r"has this passage: “(.+)", "key_value": r"Answer: (.+: .+)"}
TASKS = [share for share in MIXTURE if share.task not in (PROSE, COPY)]


@pytest.mark.parametrize("share", TASKS, ids=lambda share: share.task)
def test_every_answer_stands_in_its_context(share, book, monkeypatch):
    monkeypatch.setattr(recall_text, "MIXTURE", (share,))
    text = read_books([book])
    for number in range(5):
        document = make_document(Random(number), text)
        found = re.findall(ANSWERS.get(share.task, r"mentioned in the provided text (?:is|are) (.+)"), document)
        assert found
        context = re.split(r"\n\n?(?:What|The text above|Which word)", document)[0]
        for answer in found:
            parts = re.findall(r"\d{7}", answer) if share.task.startswith("niah") else [answer]
            assert parts
            assert all(part in context for part in parts), (answer, document)


def test_a_copy_is_the_same_line_three_times(book, monkeypatch):
    monkeypatch.setattr(recall_text, "MIXTURE", tuple(share for share in MIXTURE if share.task == COPY))
    text = read_books([book])
    lengths = set()
    for number in range(5):
        first, *more = make_document(Random(number), text).split("\n")
        assert more == [first, first]
        lengths.add(len(first.split()))
    assert len(lengths) > 1
    assert all(10 <= length <= 100 for length in lengths)


def test_the_file_is_the_same_for_a_seed_and_another_for_another(book, tmp_path, capsys):
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        output = tmp_path / "new" / f"{name}.jsonl"
        words = ["--text", str(book), "--documents", "40", "--seed", str(seed), "--output", str(output)]
        assert main(words) == 0
        texts.append([json.loads(line)["text"] for line in output.read_text(encoding="utf-8").splitlines()])
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 40
    assert "40 documents are in" in capsys.readouterr().out


def test_a_short_book_is_refused_before_anything_is_written(tmp_path, capsys):
    """Risk: a sample asks for more sentences than there are, and the command ends in the middle with a traceback."""
    short, output = tmp_path / "short.txt", tmp_path / "out.jsonl"
    short.write_text("One sentence only. And another.", encoding="utf-8")
    assert main(["--text", str(short), "--output", str(output)]) == 2
    assert (
        capsys.readouterr().err.strip().endswith("--text is too short for prose, which takes 30 parts of it; add books")
    )
    assert not output.exists()
