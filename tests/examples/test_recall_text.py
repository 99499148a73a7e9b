"""Guards: the recall model's text has every kind of document, and every answer is in its context."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from random import Random

import pytest

from examples.recall_text import COPY, PROSE, STAGES, frequent_words, main, make_document, read_books

FULL = STAGES["full"]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Sentences of different words, as many as the longest document takes."""
    rng = Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(4, 9))) for _ in range(4000)]
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(" ".join(" ".join(rng.sample(words, 12)).capitalize() + "." for _ in range(200)), encoding="utf-8")
    return path


ANSWERS = {"verbatim": r"has this passage: “(.+)", "key_value": r"Answer: (.+: .+)"}
TASKS = sorted({share.task for share in FULL.mixture} - {PROSE, COPY})


def documents(stage, task, book, count=5) -> list[str]:
    """Documents of one kind alone."""
    stage = replace(stage, mixture=tuple(share for share in stage.mixture if share.task == task))
    text = read_books([book], stage)
    return [make_document(Random(number), stage, text, frequent_words(text, stage.words)) for number in range(count)]


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_stands_in_its_context(task, book):
    for document in documents(FULL, task, book):
        found = re.findall(ANSWERS.get(task, r"mentioned in the provided text (?:is|are) (.+)"), document)
        assert found
        context = re.split(r"\n\n?(?:What|The text above|Which word)", document)[0]
        for answer in found:
            parts = re.findall(r"\d{7}", answer) if task.startswith("niah") else [answer]
            assert parts
            assert all(part in context for part in parts), (answer, document)


@pytest.mark.parametrize("stage", STAGES)
def test_a_copy_is_the_same_line_of_frequent_words_again(stage, book):
    share = next(share for share in STAGES[stage].mixture if share.task == COPY)
    words = set(frequent_words(read_books([book], STAGES[stage]), STAGES[stage].words))
    lengths = set()
    for document in documents(STAGES[stage], COPY, book):
        first, *more = document.split("\n")
        assert more == [first] * (STAGES[stage].copies - 1)
        assert set(first.split()) <= words
        lengths.add(len(first.split()))
    assert len(lengths) > 1
    assert all(share.least <= length <= share.most for length in lengths)


def test_the_last_stage_asks_more_about_each_context(book):
    asked = {
        stage: max(
            document.count("Which word belongs to") for document in documents(STAGES[stage], "key_value", book, 9)
        )
        for stage in ("full", "answers")
    }
    assert asked == {"full": 4, "answers": 10}


def test_the_file_is_the_same_for_a_seed_and_another_for_another(book, tmp_path, capsys):
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        output = tmp_path / "new" / f"{name}.jsonl"
        words = ["--text", str(book), "--documents", "40", "--seed", str(seed), "--output", str(output)]
        assert main(words) == 0
        texts.append([json.loads(line)["text"] for line in output.read_text(encoding="utf-8").splitlines()])
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 40
    assert "wrote 40 documents to" in capsys.readouterr().out


def test_a_short_book_is_refused_before_anything_is_written(tmp_path, capsys):
    """Risk: a sample asks for more sentences than there are, and the command ends in the middle with a traceback."""
    short, output = tmp_path / "short.txt", tmp_path / "out.jsonl"
    short.write_text("One sentence only. And another.", encoding="utf-8")
    assert main(["--text", str(short), "--output", str(output)]) == 2
    assert (
        capsys.readouterr().err.strip().endswith("--text is too short for prose, which needs 30 parts of it; add books")
    )
    assert not output.exists()


@pytest.mark.parametrize("words", [3, 40])
def test_words_says_from_how_many_words_copies_are_made(words, book, tmp_path):
    argv = ["--text", str(book), "--stage", "copies", "--words", str(words), "--documents", "60"]
    assert main([*argv, "--output", str(tmp_path / "copies.jsonl")]) == 0
    lines = (tmp_path / "copies.jsonl").read_text(encoding="utf-8").splitlines()
    assert len({word for line in lines for word in json.loads(line)["text"].split()}) == words
