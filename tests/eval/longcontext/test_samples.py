"""Guards the tasks that are made: what a context has, that it has the answer, that a sample is as long as fits."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from sinkmodel.errors import UserError
from sinkmodel.tasks import own_text, ruler
from sinkmodel.tasks import text as text_module
from sinkmodel.tasks.cells import fit, made_cell, make_sample
from sinkmodel.tasks.samples import CONTAINED, Question, Setting
from sinkmodel.tasks.text import OwnText, read_own_text, split_sentences
from sinkmodel.tasks.tokens import prompt_size
from sinkmodel.tasks.words import PAIRS, WORDS, pair
from tests.eval.longcontext.conftest import sentences

TASKS = ruler.TASKS | own_text.TASKS
TEXT = OwnText(list(split_sentences(sentences(2000))))
TWICE = " ".join([*TEXT.sentences, *TEXT.sentences])
LENGTH = 2500
SETTING = Setting(LENGTH, 3, TEXT)


def built(name: str, units: int, number: int = 0, setting: Setting = SETTING):
    return TASKS[name].build(Random(f"5 {name} {number}"), units, setting)


# -------------------------------------------------------------------------------------------------- all of the tasks


def test_the_prompt_of_a_seed_is_known_to_the_letter():
    """Risk: a change of wording or of the order of draws makes published numbers impossible to repeat."""
    sample = built("niah_single_1", 2)
    (question,) = sample.questions
    key, value = re.fullmatch(
        r"The grass .*\n?One of the special magic numbers for (\S+) is: (\d{7})\.\n?.*", sample.context, re.DOTALL
    ).groups()
    assert (key, value) == ("rusty-cotton", "2934887")
    assert sample.before == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n"
    )
    assert sample.context == f"{ruler.NOISE}\nOne of the special magic numbers for {key} is: {value}.\n{ruler.NOISE}"
    assert question == Question(
        f"\nWhat is the special magic number for {key} mentioned in the provided text? The special magic number for "
        f"{key} mentioned in the provided text is",
        (value,),
        value,
        ("5986655", "4554074", "9155223"),
    )


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_depends_on_seed_task_number_and_length_alone(loaded, name):
    """Risk: memories, or a second command with more samples, would read other contexts under the same number."""

    def sample(seed, number):
        return make_sample(loaded, TASKS[name], SETTING, seed, number, 8)

    alone = sample(3, 1)
    assert sample(3, 0) != alone
    assert sample(3, 1) == alone
    assert sample(4, 1) != alone


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_fits_and_one_more_unit_does_not(loaded, name):
    task = TASKS[name]
    sample = make_sample(loaded, task, SETTING, 0, 0, 40)
    assert prompt_size(loaded, sample, 40) <= LENGTH
    units = task.least
    while task.build(Random(f"0 {name} 0"), units, SETTING) != sample:
        units += 1
    more = task.build(Random(f"0 {name} 0"), units + 1, SETTING)
    assert prompt_size(loaded, more, 40) > LENGTH
    assert prompt_size(loaded, sample, 40) > 0.85 * LENGTH


def test_room_for_an_answer_is_the_tasks_or_as_given(loaded):
    """Risk: a prompt that fills the length leaves no position for its answer."""
    task, sizes = TASKS["niah_single_1"], {}
    for given, room in ((None, 128), (30, 30)):
        cell = made_cell(loaded, task, SETTING, 0, 2, given, lambda count: None)
        assert {reading.asked[0].room for reading in cell.readings} == {room}
        sizes[room] = max(reading.tokens for reading in cell.readings)
        assert sizes[room] - len(loaded.sink_ids) + room <= LENGTH
    assert sizes[30] > sizes[128]


@pytest.mark.parametrize("slope", [1, 3.7, 40])
@pytest.mark.parametrize("least", [1, 5])
def test_fit_finds_the_largest_that_fits(slope, least):
    def size(n):
        return int(20 + slope * n + (n % 7 == 0))

    for limit in (10, 60, 300, 1000):
        fitting = [n for n in range(least, 1200) if size(n) <= limit]
        units, tokens = fit(size, limit, least)
        assert units == (fitting[-1] if fitting else least - 1)
        assert tokens == size(units if fitting else least)
        if fitting:
            assert fit(size, limit, least, most=fitting[-1] // 2 + least)[0] == min(
                fitting[-1], fitting[-1] // 2 + least
            )


def test_fit_takes_few_looks():
    """Risk: each look tokenizes a whole prompt."""
    looks = []
    fit(lambda n: looks.append(n) or 30 + 25 * n, 100_000, 1)
    assert len(looks) <= 6


@pytest.mark.parametrize("name", TASKS)
def test_distractors_have_the_form_of_the_answer_and_are_wrong(loaded, name):
    sample = make_sample(loaded, TASKS[name], SETTING, 0, 2, 8)
    for question in sample.questions:
        assert len(set(question.distractors)) == len(question.distractors) == 3
        assert CONTAINED.score(question.reference, question) == 1
        for wrong in question.distractors:
            assert CONTAINED.score(wrong, question) == 0
            assert len(wrong.split()) == len(question.reference.split())


def test_no_prompt_ends_with_a_space():
    for name, task in TASKS.items():
        for question in built(name, max(task.least, 12)).questions:
            assert not question.text[-1].isspace()


def test_no_word_is_a_part_of_another():
    """Risk: an answer would count as given because another word contains it."""
    assert len(set(WORDS)) == len(WORDS) > 600
    assert not [(a, b) for a in WORDS for b in WORDS if a != b and a in b]
    assert pair(0).count("-") == 1
    assert len({pair(number) for number in range(PAIRS)}) == PAIRS


# -------------------------------------------------------------------------------------------------------------- RULER

NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.(?:\s|$)")


@pytest.mark.parametrize(
    ("name", "needles", "answers", "kind"),
    [
        ("niah_single_1", 1, 1, "numbers"),
        ("niah_single_2", 1, 1, "numbers"),
        ("niah_single_3", 1, 1, "uuids"),
        ("niah_multikey_1", 4, 1, "numbers"),
        ("niah_multikey_2", 31, 1, "numbers"),
        ("niah_multikey_3", 31, 1, "uuids"),
        ("niah_multivalue", 4, 4, "numbers"),
        ("niah_multiquery", 4, 4, "numbers"),
    ],
)
def test_needles_are_in_the_haystack_exactly_once(name, needles, answers, kind):
    """Risk: a question without an answer in the context, or with two."""
    form = r"\d{7}" if kind == "numbers" else r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    for number in range(20):
        sample = built(name, 30, number)
        found = NEEDLE.findall(sample.context)
        (question,) = sample.questions
        assert len(found) == needles
        assert {of_kind for of_kind, _, _ in found} == {kind}
        assert all(re.fullmatch(form, value) for _, _, value in found)
        asked = re.search(r" for (.*) mentioned in the provided text\? ", question.text)[1]
        keys = re.split(r", and |, ", asked)
        expected = {value for _, key, value in found if key in keys}
        assert set(question.answers) == expected
        assert len(question.answers) == answers
        assert all(sample.context.count(value) == 1 for value in question.answers)
        assert len({value for _, _, value in found}) == needles


def test_questions_about_several_values_are_in_the_plural():
    assert built("niah_multivalue", 30).before.startswith("Some special magic numbers are hidden")
    question = built("niah_multiquery", 30).questions[0]
    assert question.text.startswith("\nWhat are all the special magic numbers for ")
    assert question.text.endswith(" mentioned in the provided text are")
    assert question.reference == "{}, {}, {}, and {}".format(*question.answers)


def test_haystacks_are_whole_and_needles_are_spread_over_all_depths():
    places = {"niah_single_1": [], "niah_single_2": [], "niah_multikey_2": []}
    for name, found in places.items():
        for number in range(200):
            sample = built(name, 30, number)
            found.append(sample.context.index(sample.questions[0].reference) / len(sample.context))
            rest = NEEDLE.sub("", sample.context)
            if name == "niah_single_1":
                assert rest.split() == (ruler.NOISE.split() * 30)
            elif name == "niah_single_2":
                assert rest.count(".") == 30
                assert " ".join(rest.split()) in TWICE
            else:
                assert not rest.split()
        assert min(found) < 0.1
        assert max(found) > 0.9
        assert 0.4 < sum(found) / 200 < 0.6


def test_a_hard_needle_has_its_distractors_in_the_context():
    sample = built("niah_multikey_1", 30)
    others = {value for _, _, value in NEEDLE.findall(sample.context)} - set(sample.questions[0].answers)
    assert set(sample.questions[0].distractors) == others
    sample = built("niah_multikey_2", 30)
    assert all(wrong in sample.context for wrong in sample.questions[0].distractors)


def test_a_variable_is_traced_over_four_hops_in_order():
    for number in range(20):
        sample = built("vt", 12, number)
        (question,) = sample.questions
        lines = sample.context.split("\n")
        assert lines.count(ruler.NOISE) == 12
        value = re.search(r"assigned the value (\d{5}) in the text above", question.text)[1]
        names = question.answers
        chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]
        assert [line for line in lines if line.startswith("VAR")] == chain
        assert len(set(names)) == 5 == ruler.HOPS + 1
        assert all(re.fullmatch("[A-Z]{5}", name) for name in names)
        assert question.reference == " ".join(names)
        assert "5 variables are assigned" in question.text


def test_the_worked_example_of_variable_tracking_is_another_chain_with_its_answer():
    sample = built("vt", 12)
    example, _, ask = sample.before.partition("\n\nMemorize and track")
    value, listed = re.search(r"assigned the value (\d{5}), they are: (.*)$", example).groups()
    assert value not in sample.context
    assert re.fullmatch("[A-Z]{3}( [A-Z]{3}){4}", listed)
    assert f"VAR {listed.split()[0]} = {value}" in example
    assert ask == " the chain(s) of variable assignment hidden in the following text.\n\n"
    long = ruler.TASKS["vt"].build(Random(0), 12, Setting(8192, 0))
    assert long.before.count(ruler.NOISE) == 15


@pytest.mark.parametrize(("length", "common", "uncommon"), [(2500, 6, 1), (4096, 30, 3)])
def test_ten_words_are_common(length, common, uncommon):
    for units in (20, 700):  # 700: more than there are words, so they are pairs
        sample = ruler.TASKS["cwe"].build(Random(1), units, Setting(length, 2))
        listed = re.findall(r"(\d+)\. (\S+)", sample.context)
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        counts = Counter(word for _, word in listed)
        (question,) = sample.questions
        assert {word for word, count in counts.items() if count == common} == set(question.answers)
        assert len(question.answers) == 10
        assert sorted(Counter(counts.values()).items()) == [(uncommon, units - 10), (common, 10)]
        assert question.reference == " ".join(f"{n}. {word}" for n, word in enumerate(question.answers, 1))
        example = sample.before.split("in the list are: ")[1].split("\n")[0]
        assert re.fullmatch(r"1\. \S+ .* 10\. \S+", example)


def test_coded_words_are_as_frequent_as_the_zeta_distribution_has_them():
    sample = built("fwe", 1000)
    counts = Counter(sample.context.split())
    (question,) = sample.questions
    ranked = [word for word, _ in counts.most_common()]
    assert ranked[0] == "..."
    assert set(ranked[1:4]) == set(question.answers)
    assert [counts[word] for word in ranked[:4]] == [int(1000 / k**2 / (3.14159265358979**2 / 6)) for k in (1, 2, 3, 4)]
    assert len({*ranked[1:]}) <= LENGTH // 50 - 1
    assert all(re.fullmatch("[a-z]{6}", word) for word in ranked[1:])
    least = Counter(built("fwe", ruler.TASKS["fwe"].least).context.split()).most_common()
    assert least[3][1] > least[4][1], "else the third answer is not the third"


# ----------------------------------------------------------------------------------------------------------- own text


def test_a_quoted_passage_is_found_by_its_number():
    for number in range(10):
        sample = built("passages", 9, number)
        passages = dict(re.findall(r"Passage (\d{4}): (.*)", sample.context))
        assert len(passages) == 9
        assert len(sample.questions) == SETTING.questions
        assert len({question.answers for question in sample.questions}) == SETTING.questions
        for question in sample.questions:
            quote = re.search("“(.*)”", question.text)[1]
            assert len(quote.split()) == own_text.QUOTE
            assert sample.context.count(quote) == 1
            assert quote in passages[question.reference]
            assert sample.context.count(question.reference) == 1
            assert set(question.distractors) < set(passages)


def test_a_number_that_the_text_has_is_not_the_number_of_a_passage():
    """Risk: a number would be given because it is in the text."""
    numbers = [str(number) for number in range(1000, 5000)]
    text = OwnText([f"x{' y'.join(numbers[place : place + 40])}." for place in range(0, 4000, 40)])
    sample = own_text.find_passage(Random(0), 100, Setting(1000, 2, text))
    labels = re.findall(r"Passage (\d+):", sample.context)
    assert len(labels) == 100
    assert all(int(label) >= 5000 for label in labels)


def test_a_value_that_is_a_part_of_another_word_is_not_asked_for():
    text = OwnText([f"{word}. {word}s." for word in WORDS[:40]])
    for number in range(20):
        sample = own_text.recall_value(Random(number), 30, Setting(1000, 2, text))
        assert all(sample.context.count(question.reference) == 1 for question in sample.questions)


def test_a_key_has_one_value():
    for number in range(10):
        sample = built("key_value", 40, number)
        pairs = [line.split(": ") for line in sample.context.split("\n")]
        words = [word for of_line in pairs for word in of_line]
        assert len(set(words)) == len(words) == 80
        assert len(sample.questions) == SETTING.questions
        for question in sample.questions:
            key = re.search(r"Which word belongs to (\w+) in the list above\? Answer: (\w+):$", question.text)
            assert key[1] == key[2]
            assert dict(pairs)[key[1]] == question.reference
            assert sample.context.count(question.reference) == 1
            assert set(question.distractors) < {value for _, value in pairs}


def test_a_quote_goes_on_as_the_text_does():
    for number in range(10):
        sample = built("verbatim", 5, number)
        for question in sample.questions:
            quote = question.text.partition("“")[2]
            assert len(quote.split()) == own_text.QUOTE
            assert sample.context.count(quote) == 1
            assert f"{quote} {question.reference}" in sample.context
            assert len(question.reference.split()) == own_text.CONTINUATION
            assert all(wrong in sample.context for wrong in question.distractors)


def test_the_words_after_a_quote_are_not_among_the_wrong_ones():
    for number in range(5):
        sample = built("verbatim", 1, number, Setting(LENGTH, 60, TEXT))
        for question in sample.questions:
            assert len(question.distractors) > 20
            assert question.reference not in question.distractors


@pytest.mark.parametrize("name", ["niah_single_2", "passages", "verbatim"])
def test_samples_begin_all_over_the_text(name):
    """Risk: every context from the same page, so that intervals say nothing of other pages."""
    starts = set()
    for number in range(50):
        context = NEEDLE.sub("", re.sub(r"^Passage \d+: ", "", built(name, 3, number).context))
        starts.add(TWICE.index(context[:40].strip()) * 10 // (len(TWICE) // 2))
    assert starts == set(range(10))


def test_a_text_is_read_as_sentences_of_all_its_files(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.jsonl"
    one.write_text("First  one!\nIs it? “Yes.” So\nit is… and on")
    two.write_text('{"text": "A. B."}\n{"text": "好。是的。"}\n')
    text, texts = read_own_text([one, two])
    assert text.sentences == ["First one!", "Is it?", "“Yes.”", "So it is…", "and on", "A.", "B.", "好。", "是的。"]
    assert [(of.file, of.sentences) for of in texts] == [(str(one), 5), (str(two), 4)]


def test_a_sentence_without_an_end_is_cut_between_words():
    words = "abcd " * 500
    cut = list(split_sentences(words))
    assert " ".join(cut).split() == words.split()
    assert max(map(len, cut)) <= text_module.LONGEST
    assert "".join(split_sentences("x" * 1000)) == "x" * 1000


def test_what_is_beyond_the_first_characters_is_not_read_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text_module, "MOST_CHARACTERS", 100)
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for file in files:
        file.write_text("One two three. " * 5)
    text, texts = read_own_text(files)
    assert [of.characters for of in texts] == [75, 25]
    assert len(" ".join(text.sentences)) <= 100
    assert "only the first 100 characters" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.needs_text])
def test_a_text_that_is_too_short_is_one_line(loaded, name):
    """Risk: a haystack that repeats itself, which is easy to compress."""
    for count in (1, 12):
        setting = Setting(LENGTH, 2, OwnText(list(split_sentences(sentences(count)))))
        with pytest.raises(UserError, match=rf"{name} runs out of text at --length {LENGTH}; give a longer text"):
            make_sample(loaded, TASKS[name], setting, 0, 0, 8)


@pytest.mark.parametrize("name", TASKS)
def test_a_length_that_is_too_short_says_which_would_do(loaded, name):
    with pytest.raises(UserError, match=rf"--length 60 is too short for {name}") as caught:
        make_sample(loaded, TASKS[name], Setting(60, 0, TEXT), 0, 0, 8)
    needed = int(re.search(r"use --length (\d+) or more", str(caught.value))[1])
    assert needed > 60
    make_sample(loaded, TASKS[name], Setting(needed, 0, TEXT), 0, 0, 8)
    with pytest.raises(UserError, match=f"use --length {needed} or more"):
        make_sample(loaded, TASKS[name], Setting(needed - 1, 0, TEXT), 0, 0, 8)


def test_a_text_that_is_all_numbers_has_none_left_for_passages():
    text = OwnText([" ".join(map(str, range(place, place + 45))) for place in range(1000, 10_000, 45)])
    with pytest.raises(UserError, match="--text has too many numbers to number its passages; leave out passages"):
        own_text.find_passage(Random(0), 200, Setting(1000, 2, text))


def test_a_text_that_says_the_same_all_the_time_cannot_be_asked_about():
    with pytest.raises(UserError, match="no words that occur only once"):
        own_text.continue_quote(Random(0), 3, Setting(500, 2, OwnText(["all the same words again. " * 10] * 50)))
