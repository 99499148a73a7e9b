"""Guards how an answer is scored: with a model of perfect memory, and against plain forwards of a random one."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F

from eval.measures.longcontext.answers import Reader
from sinkmodel.errors import UserError
from sinkmodel.loading import LoadedModel, encode, load_model
from sinkmodel.tasks import ruler
from sinkmodel.tasks.cells import make_sample
from sinkmodel.tasks.samples import CONTAINED, Metric, Question, Sample, Setting
from sinkmodel.tasks.tokens import in_tokens
from tests.eval.longcontext.standins import Everything, Forgetful, Scripted, TokenMemory

NEVER_FINAL = Metric("length", lambda text, question: len(text) / 1000)


@pytest.fixture(scope="module")
def scripted(loaded):
    return LoadedModel(Scripted(loaded), loaded.tokenizer, loaded.sink_ids, loaded.name)


@pytest.fixture(scope="module")
def readings(loaded):
    task, setting = ruler.TASKS["niah_multikey_2"], Setting(1400, 3)
    return [in_tokens(loaded, make_sample(loaded, task, setting, 0, number, 20), 20) for number in range(2)]


def several() -> Sample:
    questions = [Question(f"\nWhat is {n}? It is", (f"n{n}",), f"n{n}", (f"m{n}", f"k{n}k{n}")) for n in "123"]
    return Sample("Listen. ", "one is n1, two is n2, three is n3, and so on for a while", tuple(questions))


# ------------------------------------------------------------------------------------------- a model of perfect memory


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_a_needle_is_found_until_exactly_the_token_where_it_is_forgotten(scripted, readings, place):
    """Risk: the measure itself. The budget at which a needle is just whole is known to the token."""
    reader = Reader(scripted)
    for reading in readings[:2]:
        (asked,) = reading.asked
        ids = reading.context + (asked.ids if place == "inside" else [])
        needle = f"{asked.question.reference}."
        text = scripted.tokenizer.decode(ids)
        begin = text.rindex("One of the special magic numbers for", 0, text.index(needle))
        whole = next(n for n in range(len(ids)) if len(scripted.tokenizer.decode(ids[-n:])) >= len(text) - begin and n)
        for budget, found in ((whole - 1, 0), (whole, 1), (10**6, 1)):
            (answer,), held, kept = reader.ask(TokenMemory(budget), reading, place, CONTAINED)
            assert answer.score == found
            assert (answer.rank == 1) == found
            assert answer.exact == bool(found)
            assert (answer.nll < 1) == found
            assert (held, kept) == (2 * min(budget, len(ids)), min(budget, len(ids)))
            assert answer.text == (f" {asked.question.reference}" if found else answer.text)


def test_what_is_compressed_is_the_context_alone_or_with_the_question(scripted, loaded):
    """Risk: a memory that knows the question passes for one that does not."""
    reading = in_tokens(loaded, several(), 4)
    outside, inside = TokenMemory(), TokenMemory()
    Reader(scripted).ask(outside, reading, "outside", CONTAINED)
    Reader(scripted).ask(inside, reading, "inside", CONTAINED)
    assert outside.prompts == [reading.context], "read once for all questions"
    assert inside.prompts == [reading.context + asked.ids for asked in reading.asked]


def test_nothing_that_is_asked_or_scored_stays_in_the_memory(scripted, loaded):
    reading, memory = in_tokens(loaded, several(), 4), TokenMemory(30)
    Reader(scripted).ask(memory, reading, "outside", CONTAINED)
    assert memory.ids == reading.context[-30:]


def test_generation_stops_when_the_score_is_final_at_an_end_of_text_or_when_the_room_is_used(
    scripted, readings, loaded
):
    reader, reading = Reader(scripted), readings[0]
    value = reading.asked[0].question.reference
    (answer,), _, _ = reader.ask(TokenMemory(), reading, "outside", CONTAINED)
    assert answer.text == f" {value}"
    (answer,), _, _ = reader.ask(TokenMemory(), reading, "outside", NEVER_FINAL)
    assert answer.text.startswith(f" {value}.")
    assert len(encode(loaded, answer.text)) >= 20 - 1
    reader._next.ends |= {encode(loaded, ".")[0]}
    (answer,), _, _ = reader.ask(TokenMemory(), reading, "outside", NEVER_FINAL)
    assert answer.text == f" {value}"


def test_ends_are_those_of_the_model_and_of_the_tokenizer(loaded):
    reader = Reader(loaded)
    assert loaded.tokenizer.eos_token_id in reader._next.ends
    assert reader._next.ends >= {loaded.model.generation_config.eos_token_id}


def test_the_tokens_that_a_model_must_not_give_are_not_generated(loaded):
    """Risk: a sink token in an answer."""
    reader, asked = Reader(loaded), dataclasses.replace(in_tokens(loaded, several(), 1).asked[0], room=1)
    rows = loaded.model.get_input_embeddings().num_embeddings
    logits_V = torch.zeros(rows)
    logits_V[loaded.sink_ids[0]], logits_V[encode(loaded, "x")[0]] = 9, 5
    assert reader.generate(None, logits_V, asked, CONTAINED) == "x"


# --------------------------------------------------------------------------------------------- a random model, exactly


def test_dense_is_the_model_itself(loaded):
    """Risk: an answer's nats are off by a token. Against one forward over prompt and answer."""
    reading = in_tokens(loaded, several(), 5)
    for place in ("outside", "inside"):
        answers, _, _ = Reader(loaded).ask(Everything(), reading, place, NEVER_FINAL)
        for asked, answer in zip(reading.asked, answers):
            prompt = reading.context + asked.ids
            nats = []
            for ids in asked.candidates:
                logits_TV = loaded.model(input_ids=torch.tensor([prompt + ids])).logits[0]
                nats.append(F.cross_entropy(logits_TV[len(prompt) - 1 : -1], torch.tensor(ids)).item())
            assert len({len(ids) for ids in asked.candidates}) > 1, "else a sum would do"
            assert answer.nll == pytest.approx(nats[0], abs=1e-4)
            assert answer.rank == 1 + sum(other < nats[0] for other in nats[1:])
            greedy = list(prompt)
            never = torch.arange(loaded.model.get_input_embeddings().num_embeddings)[Reader(loaded)._next._never_V]
            for _ in range(5):
                logits_V = loaded.model(input_ids=torch.tensor([greedy])).logits[0, -1]
                logits_V[never] = -torch.inf
                greedy.append(int(logits_V.argmax()))
            assert answer.text == loaded.tokenizer.decode(greedy[len(prompt) :])


def test_an_exact_match_is_the_beginning_of_the_greedy_generation(loaded):
    """Risk: a match in which one token was not the model's choice, or a token that must not be generated was."""
    reader, reading = Reader(loaded), in_tokens(loaded, several(), 5)
    for place in ("outside", "inside"):
        memory = Everything()
        for number, (asked, state, logits_V) in enumerate(reader._states(memory, reading, place)):
            greedy, fork = [], state.fork()
            for _ in range(4):
                greedy += reader._next.choose(logits_V[None])
                logits_V = reader._feed(fork, greedy[-1:])[-1]
            for wrong in (None, 0, 3):
                ids = [token if at != wrong else (token + 1) % 100 for at, token in enumerate(greedy)]
                given = dataclasses.replace(asked, candidates=[ids, *asked.candidates[1:]])
                (answer,), *_ = reader.ask(
                    Everything(), dataclasses.replace(reading, asked=(given,)), place, NEVER_FINAL
                )
                assert answer.exact == (wrong is None), (number, wrong)


def test_the_answer_alone_is_scored_after_the_prompt_without_its_context(loaded):
    (asked, *_) = in_tokens(loaded, several(), 5).asked
    ids = loaded.sink_ids + encode(loaded, "Listen. \nWhat is 1? It is")
    right = asked.candidates[0]
    logits_TV = loaded.model(input_ids=torch.tensor([ids + right])).logits[0]
    expected = F.cross_entropy(logits_TV[len(ids) - 1 : -1], torch.tensor(right)).item()
    assert Reader(loaded).nll_alone(asked) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", [Everything, Forgetful])
def test_a_fork_gives_the_same_as_a_fresh_reading(loaded, kind):
    """Risk: the second question is answered by a memory that has read the first."""
    reading = in_tokens(loaded, several(), 5)
    together, _, _ = Reader(loaded).ask(kind(12), reading, "outside", NEVER_FINAL)
    alone = []
    for asked in reading.asked:
        one = type(reading)(reading.context, (asked,))
        alone += Reader(loaded).ask(kind(12), one, "outside", NEVER_FINAL)[0]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.nll for answer in together] == [answer.nll for answer in alone]
    dense, _, _ = Reader(loaded).ask(Everything(), reading, "outside", NEVER_FINAL)
    assert (kind is Everything) == ([answer.nll for answer in together] == [answer.nll for answer in dense])


def test_a_memory_can_be_used_again(loaded):
    reading, memory = in_tokens(loaded, several(), 5), Forgetful(12)
    once = Reader(loaded).ask(memory, reading, "inside", NEVER_FINAL)
    assert Reader(loaded).ask(memory, reading, "inside", NEVER_FINAL) == once
    assert len(memory.reads) == 6


def test_the_first_token_inside_is_predicted_by_the_whole_prompt(loaded):
    """As in the papers; what is forgotten shows from the second token on."""
    question = Question("\nWhat is it? It is", ("n",), "n")
    reading = in_tokens(loaded, Sample("", several().context, (question,)), 5)
    single = type(reading.asked[0])(question, reading.asked[0].ids, [[77]], reading.asked[0].alone, 1)
    reading = type(reading)(reading.context, (single,))

    def nll(kind, place):
        return Reader(loaded).ask(kind(12), reading, place, NEVER_FINAL)[0][0].nll

    assert nll(Forgetful, "inside") == pytest.approx(nll(Everything, "inside"), abs=1e-5)
    assert nll(Forgetful, "outside") != pytest.approx(nll(Everything, "outside"), abs=1e-3)


def test_without_distractors_there_is_no_rank(loaded):
    sample = Sample("", several().context, (Question("\nWhat?", ("n",), "n"),))
    (answer,), _, _ = Reader(loaded).ask(Everything(), in_tokens(loaded, sample, 3), "outside", CONTAINED)
    assert answer.rank is None


def test_logits_that_are_not_finite_are_no_answer(loaded):
    broken = load_model(loaded.name)
    broken.model.model.norm.register_forward_hook(lambda _, args, out: out * float("nan"))
    with pytest.raises(UserError, match="not finite"):
        Reader(broken).ask(Everything(), in_tokens(loaded, several(), 3), "outside", CONTAINED)
    with pytest.raises(UserError, match="not finite"):
        Reader(broken).nll_alone(in_tokens(loaded, several(), 3).asked[0])


def test_the_scripted_model_reads(scripted, loaded):
    """Guards the stand-in: it forgets with its memory, and gives a value only after a question."""
    text = "One of the special magic numbers for a-b is: 1234567. "
    text += "The special magic number for a-b mentioned in the provided text is"
    answer = ""
    for _ in range(20):
        answer += loaded.tokenizer.decode([scripted.model.next_token(encode(loaded, text + answer))])
    assert re.match(r" 1234567\. ", answer)
    assert loaded.tokenizer.decode([scripted.model.next_token(encode(loaded, text[20:]))]) != " 1"
