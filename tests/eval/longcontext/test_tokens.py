"""Guards samples in tokens: the cut between context and question, answers, sinks, prompts that lose their middle."""

from __future__ import annotations

import itertools

import pytest

from sinkmodel.loading import LoadedModel, encode, load_model
from sinkmodel.tasks.samples import Question, Sample
from sinkmodel.tasks.tokens import _common, in_tokens, in_tokens_cut, prompt_size
from tests import tiny

CONTEXT = "the river carried the boats away, and nobody saw them again"


def asks(*texts: str, answer: str = "the boats", distractors: tuple[str, ...] = ("a horse", "the town hall")) -> Sample:
    return Sample("Read this.\n", CONTEXT, tuple(Question(text, (answer,), answer, distractors) for text in texts))


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def model(request, loaded, tmp_path_factory) -> LoadedModel:
    if request.param == "byte-level":
        return loaded
    return load_model(str(tiny.base_folder(tmp_path_factory.mktemp("base"), "llama", tiny.sentencepiece())))


def test_context_and_question_have_the_tokens_of_the_whole_prompt(model):
    """Risk: inside and outside would differ by their tokens, not by what is compressed."""
    sample = asks("\nWhat did the river carry?", " (they were blue). What was away?")
    reading = in_tokens(model, sample, 4)
    for question, asked in zip(sample.questions, reading.asked):
        whole = encode(model, sample.before + CONTEXT + question.text)
        assert reading.context + asked.ids == model.sink_ids + whole
    assert len(reading.context) >= len(model.sink_ids) + len(encode(model, sample.before + CONTEXT)) - 3
    assert reading.tokens == len(reading.context) + max(len(asked.ids) for asked in reading.asked)


def test_a_token_over_the_border_belongs_to_the_question(model):
    """Risk: the context would hold a part of the question, or tokens that the whole prompt does not have."""
    first, last = next(
        pair
        for pair in itertools.permutations("etaoinshrdlucmfwypvbgkjqxz", 2)
        if _common(encode(model, f"{CONTEXT} {pair[0]}"), encode(model, f"{CONTEXT} {''.join(pair)}"))
        < len(encode(model, f"{CONTEXT} {pair[0]}"))
    )
    sample = Sample("", f"{CONTEXT} {first}", (Question(last, ("x",), "x"), Question(" x", ("x",), "x")))
    reading = in_tokens(model, sample, 4)
    for text, asked in zip((last, " x"), reading.asked):
        assert reading.context + asked.ids == model.sink_ids + encode(model, f"{CONTEXT} {first}{text}")
    assert len(reading.context) < len(model.sink_ids) + len(encode(model, f"{CONTEXT} {first}"))


def test_candidates_are_what_an_answer_adds(model):
    sample = asks("\nWhat did the river carry? Answer:")
    (asked,) = in_tokens(model, sample, 99).asked
    texts = ["the boats", "a horse", "the town hall"]
    for text, ids in zip(texts, asked.candidates):
        assert encode(model, f"{sample.questions[0].text} {text}") == encode(model, sample.questions[0].text) + ids
    assert len(asked.candidates) == 3


@pytest.mark.parametrize(("question", "joined"), [("Answer: ", "yes"), ("Answer:\n", "yes"), ("回答：", "yes")])
def test_an_answer_gets_no_second_space(loaded, question, joined):
    sample = Sample("", CONTEXT, (Question(f"\n{question}", ("yes",), "yes"),))
    (asked,) = in_tokens(loaded, sample, 9).asked
    assert loaded.tokenizer.decode(asked.candidates[0]) == joined


def test_the_prompt_alone_has_all_but_the_context(model):
    sample = asks("\nWhat did the river carry?")
    (asked,) = in_tokens(model, sample, 4).asked
    assert asked.alone == model.sink_ids + encode(model, "Read this.\n\nWhat did the river carry?")


def test_a_long_answer_gets_the_room_that_it_needs(loaded):
    sample = asks("\nWhat?", answer="the boats and the horse", distractors=("a much longer answer than the right one",))
    needed = len(encode(loaded, "\nWhat? the boats and the horse")) - len(encode(loaded, "\nWhat?"))
    (asked,) = in_tokens(loaded, sample, 2).asked
    assert [len(ids) for ids in asked.candidates] == [needed, needed]
    assert asked.room == needed
    assert in_tokens(loaded, sample, 50).asked[0].room == 50
    prompt = len(encode(loaded, f"Read this.\n{CONTEXT}\nWhat?"))
    assert prompt_size(loaded, sample, 2) == prompt + needed
    assert prompt_size(loaded, sample, 50) == prompt + 50
    assert [len(ids) for ids in in_tokens_cut(loaded, sample, 2, 100).asked[0].candidates] == [2, 2]


@pytest.mark.parametrize("length", [41, 42, 10_000])
def test_a_long_prompt_loses_its_middle(loaded, length):
    """Risk: the question or the instructions would be cut, or the answer would have no room."""
    sample = asks("\nWhat did the river carry?")
    whole = encode(loaded, f"Read this.\n{CONTEXT}\nWhat did the river carry?")
    reading = in_tokens_cut(loaded, sample, 6, length)
    kept = reading.context[len(loaded.sink_ids) :] + reading.asked[0].ids
    most = length - 6
    assert kept == (whole if len(whole) <= most else whole[: most // 2] + whole[-(most - most // 2) :])
    assert len(reading.asked[0].ids) == min(len(encode(loaded, "\nWhat did the river carry?")), most - most // 2)


def test_a_question_longer_than_half_is_cut_too(loaded):
    """LongBench's repobench-p has a long text in its question."""
    sample = asks("\n" + "What did the river carry? " * 9)
    reading = in_tokens_cut(loaded, sample, 2, 42)
    whole = encode(loaded, f"Read this.\n{CONTEXT}{sample.questions[0].text}")
    assert reading.context == loaded.sink_ids + whole[:20]
    assert reading.asked[0].ids == whole[-20:]
