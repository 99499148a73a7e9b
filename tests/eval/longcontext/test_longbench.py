"""Guards LongBench's files and metrics: exact values, its prompts, the first line, and one line for each wrong row.

The metrics were compared by hand with LongBench's own code, `rouge` 1.0.1 and `fuzzywuzzy` 0.18 on 20,000 random texts,
and the prompts with its published configuration.
"""

from __future__ import annotations

import json
from random import Random

import pytest

from eval.measures.longcontext import metrics
from eval.measures.longcontext.longbench import DATASETS, read_longbench, sample_of
from eval.measures.longcontext.metrics import METRICS
from sinkmodel.errors import UserError
from sinkmodel.tasks.samples import CONTAINED, Question

# ------------------------------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize(
    ("name", "text", "answer", "expected"),
    [
        ("f1", "The cat sat.", "a CAT sat", 1),
        ("f1", "the cat sat down", "cat", 0.5),
        ("f1", "no no no yes", "no no", 2 * 2 / 6),
        ("f1", "", "cat", 0),
        ("f1 of characters", "猫在家。", "猫，在", 0.8),
        ("rouge-l", "the cat sat on the mat", "the cat lay on the mat", 2 * 4 / 10),  # `the` counts once
        ("rouge-l", "a b c d", "d c b a", 2 / 8),
        ("rouge-l", "c d. a b", "a b. c d", 1),  # sentence by sentence
        ("rouge-l", "", "a", 0),
        ("rouge-l", "...", "a", 0),
        ("rouge-l of characters", "猫 在家", "猫在家", 1),
        ("retrieval", "Paragraph 3", "Paragraph 3", 1),
        ("retrieval", "3 or 13", "Paragraph 3", 0.5),
        ("retrieval", "段落13", "段落3", 0),
        ("count", "There are 12, no, 7", "7", 0.5),
        ("count", "none", "7", 0),
        ("code", "\n# a comment\nreturn x + 1\nmore", "return x + 1", 1),
        ("code", "return y", "return x", 0.88),
        ("code", "// none", "return x", 0),
    ],
)
def test_a_metric_has_its_exact_value(name, text, answer, expected):
    assert METRICS[name].score(text, Question("", (answer,), answer)) == pytest.approx(expected)


def test_a_question_is_worth_its_best_answer():
    question = Question("", ("a dog", "black cat"), "a dog")
    assert METRICS["f1"].score("cat", question) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("It is an entity", "entity", 1),
        ("an entity or a place", "entity", 0.5),
        ("a place", "entity", 0),
        ("human group", "human group", 1),  # `human` is a part of the answer's name
        ("human group", "human", 0.5),  # … and not the other way round
    ],
)
def test_a_class_counts_less_if_others_are_named(text, answer, expected):
    question = Question("", (answer,), answer, classes=("entity", "place", "human", "human group"))
    assert METRICS["classification"].score(text, question) == expected


def test_containment_is_a_share_and_knows_no_case():
    question = Question("", ("Abc", "d", "x", "y"), "")
    assert CONTAINED.score("ABC d", question) == 0.5
    assert CONTAINED.score("", question) == 0


def test_longest_common_subsequence_is_one_and_is_long():
    """Against all subsequences."""
    rng = Random(0)
    for _ in range(50):
        a, b = ([rng.choice("abc") for _ in range(rng.randint(0, 7))] for _ in range(2))
        found = metrics.longest_common_subsequence(a, b)
        both = [
            {tuple(x for place, x in enumerate(one) if mask >> place & 1) for mask in range(2 ** len(one))}
            for one in (a, b)
        ]
        assert tuple(found) in both[0] & both[1]
        assert len(found) == max(map(len, both[0] & both[1]))


@pytest.mark.parametrize("name", [*METRICS, "contained", "first line"])
def test_a_score_that_is_final_does_not_change(name):
    """Risk: generation stops early and the score is another one than that of the whole text."""
    first_line = metrics.of_first_line(METRICS["f1"])
    metric = {**METRICS, "contained": CONTAINED, "first line": first_line}[name]
    rng, finals = Random(1), 0
    question = Question("", ("Paragraph 7", "foo bar"), "foo", classes=("Paragraph 7", "foo", "foo bar"))
    parts = ["Paragraph ", "7", " foo bar", "\n", "# x", " a ", "return"]
    for _ in range(300):
        text = "".join(rng.choices(parts, k=rng.randint(0, 6)))
        if metric.is_final(text, question):
            finals += 1
            for _ in range(5):
                more = text + "".join(rng.choices(parts, k=3))
                assert metric.score(more, question) == metric.score(text, question)
    assert (finals > 0) == (name in ("contained", "code", "first line"))


# -------------------------------------------------------------------------------------------------------------- files


def row(**changes) -> dict:
    base = {"input": "Who?", "context": "Anna came.", "answers": ["Anna"], "dataset": "hotpotqa", "all_classes": None}
    return {**base, "length": 3, "language": "en", "_id": "x", **changes}


def write(path, *rows):
    path.write_text("\n".join(json.dumps(one) for one in rows))
    return path


def test_rows_are_taken_by_data_set_up_to_the_limit(tmp_path, capsys):
    one = write(tmp_path / "one.jsonl", row(), row(dataset="trec_e", answers=["b"], all_classes=["a", "b"]), row())
    two = write(tmp_path / "two.jsonl", row(input="Two?"), row(input="Three?"))
    rows, files = read_longbench([one, two], 3)
    assert [(name, [of["input"] for of in found]) for name, found in rows.items()] == [
        ("hotpotqa", ["Who?", "Who?", "Two?"]),
        ("trec", ["Who?"]),
    ]
    assert [of.rows for of in files] == [3, 1]
    assert "trec: 1 rows, fewer than --samples 3" in capsys.readouterr().err


def test_a_prompt_is_the_published_one():
    """Risk: numbers that cannot be compared with others' LongBench."""
    sample = sample_of("2wikimqa", row(context="A {input}.", input="Who, {context}?"), Random(0), 2)
    assert sample.before + sample.context + sample.questions[0].text == (
        "Answer the question based on the given passages. Only give me the answer and do not output any other words."
        "\n\nThe following are given passages.\nA {input}.\n\nAnswer the question based on the given passages. Only "
        "give me the answer and do not output any other words.\n\nQuestion: Who, {context}?\nAnswer:"
    )
    assert len(DATASETS) == 21
    for name, dataset in DATASETS.items():
        assert dataset.prompt.count("{context}") == 1, name
        assert dataset.prompt.count("{input}") == (0 if "{input}" not in dataset.prompt else 1), name


def test_a_classification_has_the_other_classes_as_distractors():
    classes = ["a", "b", "c", "d", "b"]
    sample = sample_of("trec", row(answers=["b"], all_classes=classes), Random(0), 2)
    (question,) = sample.questions
    assert question.classes == tuple(classes)
    assert len(question.distractors) == 2
    assert set(question.distractors) < {"a", "c", "d"}
    assert sample_of("hotpotqa", row(), Random(0), 2).questions[0].distractors == ()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"dataset": "hotpotqb"}, r":2: the data set 'hotpotqb' is not one of LongBench's; did you mean hotpotqa\?"),
        ({"dataset": "zzz"}, "give one of narrativeqa, "),
        ({"context": None}, ":2: 'context' is not a text"),
        ({"context": " "}, "'context' is not a text"),
        ({"input": 3}, "'input' is not a text"),
        ({"answers": "Anna"}, "'answers' is not a list of texts; give at least one"),
        ({"answers": []}, "'answers' is not a list of texts"),
        ({"answers": [""]}, "'answers' is not a list of texts"),
        ({"dataset": "trec"}, "'all_classes' is not a list of texts with the answers in it; trec needs the classes"),
        ({"dataset": "trec", "all_classes": ["x"]}, "with the answers in it"),
        ({"dataset": "passage_retrieval_en"}, "an answer of passage_retrieval_en has no number"),
    ],
)
def test_a_row_of_another_form_is_named(tmp_path, bad, message):
    file = write(tmp_path / "bad.jsonl", row(), row(**bad))
    with pytest.raises(UserError, match=message):
        read_longbench([file], 5)


@pytest.mark.parametrize("key", ["input", "context", "answers", "dataset"])
def test_a_missing_key_is_named(tmp_path, key):
    bad = row()
    del bad[key]
    with pytest.raises(UserError, match=rf"bad.jsonl:1: no key '{key}' \(there is"):
        read_longbench([write(tmp_path / "bad.jsonl", bad)], 5)


def test_a_file_without_a_row_is_refused(tmp_path):
    empty = write(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="adds no row"):
        read_longbench([empty], 5)
