"""Guards `sink-eval streameval`: the questions, the cost of an answer, and the end of the cache, exact to the token."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from eval.cli import main
from eval.measures.streams.answers import ask_questions, kept, measure_lines, rank_of_first
from eval.measures.streams.lines import HEADER, Query, Record
from eval.measures.streams.questions import Question, in_tokens, make_questions, read_questions
from eval.policies.choice import choose
from eval.policies.policy import Policy, Stream
from sinkmodel.errors import UserError
from sinkmodel.loading import encode, load_model
from sinkmodel.sinks import SinkConfig
from tests import tiny
from tests.models import build, model_of, tokens
from tests.reference import streaming_nll as reference

DISTANCE, EVERY, QUERIES, DISTRACTORS = 3, 2, 4, 5
BUDGET = 12
POLICIES = choose(["dense", "window", "window-paper", "recompute", "sink", "sink-paper"], [0, 3], BUDGET, front=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run folders of a vanilla and a sink model, and of one with more positions."""
    folders = {name: tmp_path_factory.mktemp("run") for name in (0, 2, "long")}
    tiny.checkpoint(folders[0], "llama", SinkConfig("none"))
    tiny.checkpoint(folders[2], "llama", SinkConfig("token", 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.SHAPES, "llama", dataclasses.replace(tiny.SHAPES["llama"], positions=512))
        tiny.checkpoint(folders["long"], "llama", SinkConfig("token", 1))
    return folders


@pytest.fixture(scope="module")
def loaded(runs):
    return load_model(str(runs[2]))


@pytest.fixture(scope="module")
def record(loaded):
    return Record(loaded)


def streameval(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["streameval", *map(str, arguments)])
    return (code, *capsys.readouterr())


def result_of(capsys, path, *arguments) -> dict:
    code, _, err = streameval(capsys, *arguments, "--json", path)
    assert code == 0, err
    return json.loads(path.read_text())


# ----------------------------------------------------------------------------------------- a model with perfect memory


@dataclasses.dataclass(frozen=True)
class Scripted(Policy):
    """Gives the right answer as long as the whole line is among the latest `budget` tokens, and "?" otherwise."""

    tokenizer: object
    budget: int
    name, sinks, needs, keeps, positions = "scripted", 0, "nothing", "the latest tokens", "text"

    def score(self, *_):
        raise NotImplementedError

    def stream(self, model):
        return ScriptedStream(self.tokenizer, self.budget)


class ScriptedStream(Stream):
    def __init__(self, tokenizer, budget, rows=None):
        self.tokenizer, self.budget, self.rows = tokenizer, budget, rows

    def feed(self, ids_BN):
        self.rows = [row + ids for row, ids in zip(self.rows or [[]] * len(ids_BN), ids_BN.tolist())]
        return torch.stack([self.logits(row) for row in self.rows])

    def feed_all(self, ids_BN):
        return torch.stack([self.feed(ids_B1) for ids_B1 in ids_BN.split(1, dim=1)], dim=1)

    def fork(self):
        return type(self)(self.tokenizer, self.budget, self.rows)

    def logits(self, row):
        text = self.tokenizer.decode(row[-self.budget :])
        query = re.search(r"Query: The REGISTER_CONTENT in line (\d+) is <(\d*)$", text)
        line = query and re.search(rf"^The REGISTER_CONTENT in line {query[1]} is <(\d+>)", text, re.MULTILINE)
        answer = line[1][len(query[2])] if line and line[1].startswith(query[2]) else "?"
        (token,) = self.tokenizer(answer, add_special_tokens=False).input_ids
        return 9.0 * F.one_hot(torch.tensor(token), 384).float()


def test_accuracy_falls_from_one_to_nothing_at_exactly_the_token_where_the_line_is_cut(loaded, record):
    """Guards the measure itself: distances, the true answer in the stream, greedy match, and what `kept` says."""
    samples = [record.sample(0, n, DISTANCE, EVERY, QUERIES, DISTRACTORS) for n in range(3)]
    backs = sorted({query.back for sample in samples for query in sample})
    assert len(backs) > 1, "the first queries have fewer others after them"
    for budget in sorted({back + shift for back in backs for shift in (-1, 0, 1)}):
        row = measure_lines(loaded.model, Scripted(loaded.tokenizer, budget), samples, 2, "")
        share = sum(query.back <= budget for sample in samples for query in sample) / (3 * QUERIES)
        assert row.accuracy == row.kept == share
        by_query = [float(query.back <= budget) for query in samples[0]]
        assert [value for _, _, value in row.accuracy_by_query] == by_query
        if budget >= max(backs):
            assert (row.rank, row.rank_stderr) == (1, 0)
            assert row.nll < 0.5
    row = measure_lines(loaded.model, Scripted(loaded.tokenizer, min(backs) - record.answer_tokens), samples, 2, "")
    assert (row.accuracy, row.rank) == (0, (DISTRACTORS + 2) / 2), "not even the first digit is known"


def test_distance_and_budget_decide_together(loaded, record):
    samples = {d: [record.sample(0, 0, d, EVERY, 3, 2)] for d in (1, 2, 4, 8)}
    most = {d: max(query.back for query in streams[0]) for d, streams in samples.items()}
    policy = Scripted(loaded.tokenizer, most[4])
    rows = {d: measure_lines(loaded.model, policy, streams, 1, "") for d, streams in samples.items()}
    assert {d: row.accuracy for d, row in rows.items()} == {1: 1, 2: 1, 4: 1, 8: 0}
    assert [rows[d].tokens_back_most for d in rows] == list(most.values())


@pytest.mark.parametrize("place", [30, 11, 10, 9, 8])
@pytest.mark.parametrize("index", range(len(POLICIES)))
def test_a_line_is_kept_while_a_change_of_any_of_its_tokens_is_felt(index, place):
    """Guards `kept` against the real caches, sinks too. One layer: nothing of an evicted key lives on in later ones.

    In the short streams a line may begin among the sinks and end in the window, with nothing between them evicted yet.
    """
    policy, model = POLICIES[index], build("llama", num_hidden_layers=1)
    ids, answer = tokens(place + 1, seed=1), tokens(3, seed=2)

    def last_logits(ids):
        stream = policy.stream(model)
        stream.feed(torch.tensor([ids]))
        return stream.feed_all(torch.tensor([answer[:-1]]))[0, -1]

    before, felt = last_logits(ids), []
    for changed in range(place + 1):
        others = [*ids[:changed], (ids[changed] + 7) % 61, *ids[changed + 1 :]]
        felt.append(not torch.allclose(last_logits(others), before, atol=1e-6))
    for count in (1, 3):
        for line in range(place + 2 - count):
            end = line + count
            assert kept(Query(ids, [answer], line, end, place), policy) == all(felt[line:end])
    assert place < 30 or all(felt) == (policy.budget is None)
    assert any(felt)


# -------------------------------------------------------------------------------------------------- what is asked


def test_the_text_is_that_of_the_papers_figure(loaded, record):
    """Guards the order of lines, queries and true answers, and the places that distances are counted from."""
    queries = record.sample(7, 0, DISTANCE, EVERY, QUERIES, DISTRACTORS)
    decode = loaded.tokenizer.decode
    assert queries[0].fed[:2] == loaded.sink_ids
    ids = [token for query in queries for token in query.fed]
    text = decode(ids[2:])
    contents = dict(re.findall(r"^The REGISTER_CONTENT in line (\d+) is <(\d{5})>\n", text, re.MULTILINE))
    assert list(contents) == [str(n) for n in range(11)]  # after lines 4, 6, 8 and 10, for 1, 3, 5 and 7
    expected = HEADER
    for n in range(11):
        expected += f"The REGISTER_CONTENT in line {n} is <{contents[str(n)]}>\n"
        if n in (4, 6, 8, 10):
            expected += f"Query: The REGISTER_CONTENT in line {n - 3} is <{contents[str(n - 3)]}>\n"
    assert text == expected[: expected.rindex(contents["7"])]
    for query, asked in zip(queries, (1, 3, 5, 7)):
        line = f"The REGISTER_CONTENT in line {asked} is <{contents[str(asked)]}>\n"
        assert decode(ids[query.line : query.end]) == line
        assert decode(ids[: query.place + 1]).endswith(f"Query: The REGISTER_CONTENT in line {asked} is <")
        answers = [decode(candidate) for candidate in query.candidates]
        assert answers[0] == contents[str(asked)] + ">"
        assert len(set(answers)) == DISTRACTORS + 1
        near = {contents[str(n)] + ">" for n in range(max(0, asked - 3), asked + 4)}
        assert len(set(answers) & near) == min(DISTRACTORS + 1, len(near)), "distractors stand in the stream"
        assert len({len(candidate) for candidate in query.candidates}) == 1


def test_streams_follow_from_the_seed_and_are_of_equal_length(loaded, record):
    """Guards the batch: samples are its rows. Numbers that the stream does not have fill up if lines are few."""
    first = record.sample(0, 0, 1, 1, 2, 8)
    assert first == Record(loaded).sample(0, 0, 1, 1, 2, 8)
    others = [record.sample(seed, n, 1, 1, 2, 8) for seed, n in ((0, 1), (1, 0))]
    for other in others:
        assert [len(query.fed) for query in other] == [len(query.fed) for query in first]
        assert other[0].fed != first[0].fed
    assert len({tuple(candidate) for candidate in first[0].candidates}) == 9
    least, most = record.line_tokens(1, 1, 20)
    texts = [f"The REGISTER_CONTENT in line {n} is <12345>\n" for n in (0, 20)]
    assert (least, most) == tuple(len(encode(loaded, text)) for text in texts)
    assert record.answer_tokens == len("12345>")


def test_more_lines_than_numbers_are_refused(record):
    with pytest.raises(UserError, match="20001 lines and 9 distractors needs more numbers .* lower --queries"):
        record.sample(0, 0, 1, 10_000, 2, 9)


# ------------------------------------------------------------------------------------------------- what is measured


@torch.no_grad()
def answer_nats(model, ids, count, row) -> float:
    """−log p of the last `count` of `ids` under a row's policy, by forwards that know no cache of ours."""
    budget, sinks = row["budget"], row["sinks"]
    if row["policy"] == "sink":
        return reference(model, ids, budget, sinks)[-count:].sum().item()
    nats = 0.0
    for place in range(len(ids) - count, len(ids)):
        seen = ids[:place] if row["policy"] == "dense" else ids[:sinks] + ids[place - (budget - sinks) : place]
        nats -= torch.log_softmax(model(torch.tensor([seen])).logits[0, -1], -1)[ids[place]].item()
    return nats


def test_nats_and_ranks_are_those_of_one_long_stream_fed_token_by_token(runs, loaded, record, tmp_path, capsys):
    """Guards that distractors leave no trace, that the true answer stays, and that every policy is the one named."""
    arguments = ["--model", runs[2], "--budgets", 60, "--sinks", 0, 2, "--distances", 1, "--every", 1, "--samples", 2,
                 "--queries", 2, "--distractors", 1, "--policies", "dense", "sink", "recompute"]  # fmt: skip
    result = result_of(capsys, tmp_path / "a.json", *arguments)
    samples = [record.sample(0, n, 1, 1, 2, 1) for n in range(2)]
    assert [row["label"] for row in result["rows"]] == ["dense", "sink 0+60", "sink 2+58", "recompute 2+58"]
    for row in result["rows"]:
        nats, ranks = [], []
        for queries in samples:
            before: list[int] = []
            for query in queries:
                before += query.fed
                right, wrong = (answer_nats(loaded.model, before + ids, len(ids), row) for ids in query.candidates)
                nats.append(right)
                ranks.append(1 + (wrong < right))
        assert row["nll"] == pytest.approx(sum(nats) / 4, abs=1e-3)
        assert row["rank"] == sum(ranks) / 4
        middle = [sum(nats[:2]) / 2, sum(nats[2:]) / 2]
        assert row["nll_stderr"] == pytest.approx(abs(middle[0] - middle[1]) / 2, abs=1e-3)
        assert row["accuracy"] == 0, "a random model knows nothing"
        longest = samples[0][-1].place + record.answer_tokens
        assert row["keys_seen"] == (longest if row["label"] == "dense" else 60), "the answer's own too"
    assert len({row["nll"] for row in result["rows"]}) == 4, "else the rows above prove little"
    one_by_one = result_of(capsys, tmp_path / "b.json", *arguments, "--rows", 1)
    for row, alone in zip(result["rows"], one_by_one["rows"]):
        assert alone["nll"] == pytest.approx(row["nll"], abs=1e-4)


@pytest.mark.parametrize("index", range(len(POLICIES)))
def test_a_fork_goes_on_as_the_stream_does_and_leaves_it_alone(index):
    policy, model = POLICIES[index], model_of("llama")
    ids_BN = torch.tensor([tokens(40), tokens(40, seed=1)])
    stream = policy.stream(model)
    for start, end in ((0, 9), (9, 30)):  # before anything is evicted, and after
        stream.feed(ids_BN[:, start:end])
        fork = stream.fork()
        fork.fork().feed(ids_BN[:, :20])
        ahead = fork.feed_all(ids_BN[:, end : end + 5])
    one_by_one = torch.stack([stream.feed(ids_BN[:, [i]]) for i in range(30, 35)], dim=1)
    torch.testing.assert_close(ahead, one_by_one, atol=1e-4, rtol=0)


def test_of_equals_the_rank_is_the_middle():
    nll_RK = torch.tensor([[2.0, 3.0, 4.0], [2.0, 1.0, 2.0], [5.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    assert rank_of_first(nll_RK).tolist() == [1, 2.5, 3, 2]
    assert rank_of_first(torch.tensor([[1.0]])).tolist() == [1]


def test_the_same_seed_gives_the_same_file_but_for_times(runs, tmp_path, capsys):
    lines = ["--distances", 1, 2, "--every", 1, "--samples", 3, "--queries", 2, "--distractors", 2]
    questions = ["--task", "questions", "--queries", 3]
    for task in (lines, questions):
        texts = []
        for seed in (0, 0, 1):
            result_of(capsys, tmp_path / "a.json", "--model", runs["long"], "--budgets", 60, 90, "--seed", seed, *task)
            times = r'"(date": ".*|tokens_per_second": .*)'
            texts.append(re.sub(times, "", (tmp_path / "a.json").read_text()))
        assert texts[0] == texts[1] != texts[2]


def test_the_table_says_what_a_line_takes_and_how_far_back_it_stands(runs, tmp_path, capsys):
    code, out, err = streameval(capsys, "--model", runs[0], "--budgets", 60, 100, "--distances", 1, "--samples", 2,
                                "--policies", "dense", "sink", "--queries", 3, "--every", 1)  # fmt: skip
    assert code == 0
    assert re.search(r"2 samples × 3 queries, one every 1 lines of 39 tokens", out)
    labels = re.findall(r"^ +(dense|sink \d\+\d+) ", out, re.MULTILINE)
    assert labels == ["dense", *(f"sink {s}+{c - s}" for c in (60, 100) for s in (0, 4))], "dense has no budget"
    assert "dense reaches position" in err
    assert "128 positions" in err


# -------------------------------------------------------------------------------------------------------- questions


def test_questions_in_a_stream_and_alone_are_scored_as_fresh_forwards_are(loaded):
    """Guards one-shot (sinks in front, nothing else) and the stream: earlier questions, each with its right answer."""
    questions = [in_tokens(loaded, Question(f"Is {n} it?", ["yes", "no no", "x"], n % 3)) for n in range(3)]
    policy = choose(["sink"], [2], 30)[0]
    between, before = encode(loaded, "\n\n"), list(loaded.sink_ids)
    alone = ask_questions(loaded, choose(["dense"], [0], 30)[0], questions, True, lambda _: None)
    streamed = ask_questions(loaded, policy, questions, False, lambda _: None)
    for n, question in enumerate(questions):
        before = before + question.prompt
        assert alone[2][n] == 2 + len(question.prompt)
        assert streamed[2][n] == len(before)
        for found, prefix, budget in ((alone, loaded.sink_ids + question.prompt, 10_000), (streamed, before, 30)):
            nats = [reference(loaded.model, prefix + ids, budget, 2)[-len(ids) :].sum() for ids in question.choices]
            assert found[1][n].item() == pytest.approx(nats[question.answer].item(), abs=1e-3)
            best = min(range(3), key=lambda i: nats[i] / len(["yes", "no no", "x"][i]))
            assert found[0][n] == (best == question.answer)
        before = before + question.right + between
    assert (alone[1] - streamed[1]).abs()[1:].min() > 1e-2, "else the above proves little"


class Uniform(ScriptedStream):
    def logits(self, row):
        return torch.zeros(384)


def test_the_choice_is_by_likelihood_a_character(loaded, monkeypatch):
    """Guards the normalisation: to a model that knows nothing the shortest choice is the likeliest, per token none."""
    monkeypatch.setattr(Scripted, "stream", lambda self, model: Uniform(None, 0))
    question = in_tokens(loaded, Question("Which?", ["q", "qqqqqqqq", "qqq"], 1))
    (right,), _, _ = ask_questions(loaded, Scripted(None, 0), [question], False, lambda _: None)
    lengths = [len(ids) for ids in question.choices]
    assert lengths[0] == min(lengths)
    assert lengths[1] / 8 < min(lengths[0], lengths[2] / 3)
    assert right == 1


def test_the_difference_to_one_shot_is_taken_question_by_question(runs, loaded, tmp_path, capsys):
    rows = [{"question": f"{n}?", "choices": ["a", "b c"], "answer": n % 2} for n in range(8)]
    file = tmp_path / "q.jsonl"
    file.write_text("\n\n".join(map(json.dumps, rows)))
    result = result_of(capsys, tmp_path / "a.json", "--model", runs[2], "--task", "questions", "--file", file,
                       "--budgets", 40, "--queries", 6, "--policies", "dense", "window", "recompute")  # fmt: skip
    one_shot, *streams = result["rows"]
    assert (result["questions"], one_shot["label"], one_shot["difference"]) == (6, "one-shot", None)
    assert [row["label"] for row in streams] == ["dense", "window 0+40", "recompute 2+38"]
    assert result["texts"] == [{"file": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}]
    longest = "Question: 0?\nAnswer: b c"  # its last token is predicted and never fed
    assert one_shot["keys_seen"] == 2 + len(encode(loaded, longest)) - 1
    assert [row["keys_seen"] for row in streams] == [streams[0]["tokens"] + len(encode(loaded, " b c")) - 1, 40, 40]
    assert one_shot["accuracy"] == sum(one_shot["right"]) / 6
    for row in streams:
        assert row["difference"] == pytest.approx(row["accuracy"] - one_shot["accuracy"])
        differences = torch.tensor(row["right"]).double() - torch.tensor(one_shot["right"])
        assert row["difference_stderr"] == pytest.approx(differences.std().item() / 6**0.5)


def test_the_notice_of_places_says_how_far_the_questions_go(runs, tmp_path, capsys):
    file, out = tmp_path / "q.jsonl", tmp_path / "a.json"
    rows = [{"question": f"{n}?", "choices": ["a", "b c"], "answer": 0} for n in range(9)]
    file.write_text("\n".join(map(json.dumps, rows)))
    code, _, err = streameval(capsys, "--model", runs[0], "--task", "questions", "--file", file, "--budgets", 60,
                              "--policies", "dense", "--json", out)  # fmt: skip
    assert code == 0
    seen = json.loads(out.read_text())["rows"][1]["keys_seen"]
    assert f"dense reaches position {seen - 1}, " in err


def test_questions_of_ours_hold_their_answer_once_among_choices_that_do_not_tell_it():
    questions = make_questions(3, 200)
    assert questions == make_questions(3, 200)
    assert questions != make_questions(4, 200)
    places = Counter()
    for question in questions:
        (thing, who) = re.search(r"What colour is the (\w+) of (\w+)\?$", question.text).groups()
        colour = question.choices[question.answer]
        assert len(re.findall(rf"{who} has an? {colour} {thing}\b", question.text)) == 1
        assert all(len(re.findall(rf"\b{choice}\b", question.text)) == 1 for choice in question.choices)
        assert question.choices == sorted(set(question.choices))
        places[question.answer] += 1
    assert min(places[n] for n in range(4)) > 25


def test_files_are_read_as_we_write_them_and_as_arc_does(tmp_path):
    file = tmp_path / "q.jsonl"
    rows = [
        {"question": "One?", "choices": ["a", "b"], "answer": 1},
        {"question": "Two? ", "choices": ["a", " b"], "answer": "a"},
        {"question": "Three?", "choices": {"text": ["3", "1"], "label": ["1", "2"]}, "answerKey": "2"},
        {"question": "Four?", "choices": ["a", "b", "b"], "answer": "a"},  # two wrong ones that are equal
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    expected = [Question("One?", ["a", "b"], 1), Question("Two?", ["a", "b"], 0), Question("Three?", ["3", "1"], 1)]
    expected.append(Question("Four?", ["a", "b", "b"], 0))
    assert read_questions(file) == expected
    assert read_questions(file, 2) == expected[:2]


def test_half_a_surrogate_pair_is_a_character_that_a_tokenizer_takes(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "a \\ud800?", "choices": ["\\udc00", "\\ud83d\\ude00"], "answer": 0}')
    assert read_questions(file) == [Question("a \ufffd?", ["\ufffd", "\U0001f600"], 0)]


# -------------------------------------------------------------------------------------------------------- bad input


GOOD = '{"question": "a?", "choices": ["b", "c"], "answer": 0}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no question"),
        (GOOD + "{", "q.jsonl:2: not a JSON object"),
        ("[1]", "q.jsonl:1: not a JSON object"),
        ('{"question": "a?", "answer": 0}', r"q.jsonl:1: no key 'choices' \(there is question, answer\)"),
        ('{"choices": ["b", "c"], "answer": 0}', "no key 'question'"),
        ('{"question": "a?", "choices": ["b", "c"]}', "no key 'answer'"),
        ('{"question": " ", "choices": ["b", "c"], "answer": 0}', "the question has no text"),
        ('{"question": "a?", "choices": [], "answer": 0}', "0 choices; give at least two"),
        ('{"question": "a?", "choices": ["b"], "answer": 0}', "1 choices; give at least two"),
        ('{"question": "a?", "choices": "bc", "answer": 0}', "not a list of texts"),
        ('{"question": "a?", "choices": ["b", ""], "answer": 0}', "not a list of texts"),
        ('{"question": "a?", "choices": {"label": ["b", "c"]}, "answer": 0}', "not a list of texts"),
        (
            '{"question": "a?", "choices": ["b", "c"], "answer": 2}',
            "the answer 2 is not a choice.* its number, 0 to 1",
        ),
        ('{"question": "a?", "choices": ["b", "c"], "answer": -1}', "the answer -1"),
        ('{"question": "a?", "choices": ["b", "c"], "answer": true}', "the answer True"),
        ('{"question": "a?", "choices": ["b", "c"], "answer": null}', "the answer None"),
        ('{"question": "a?", "choices": ["b", "c"], "answer": "d"}', "the answer 'd'"),
        ('{"question": "a?", "choices": ["b", "b"], "answer": "b"}', "the answer 'b' fits several choices"),
        ('{"question": "a?", "choices": ["b", "b ", "c"], "answer": 1}', "the answer 1 fits several choices"),
        (
            '{"question": "a?", "choices": {"text": ["b", "c"], "label": ["A", "A"]}, "answerKey": "A"}',
            "the answer 'A' fits several choices",
        ),
        ('{"question": "a?", "choices": {"text": ["b", "c"], "label": 5}, "answer": 0}', "labels are not a list"),
        (
            '{"question": "a?", "choices": {"text": ["b", "c"], "label": ["A", "B", "C"]}, "answer": "C"}',
            "a list of 2, one for each choice",
        ),
        (b"caf\xe9", "is not UTF-8"),
        (GOOD.replace("a?", "a? " * 80), "question 1 takes 179 tokens with its longest choice, and .* for 126"),
    ],
)
def test_a_bad_file_is_one_line(runs, tmp_path, capsys, content, message):
    file = tmp_path / "q.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = ["--model", runs[2], "--task", "questions", "--budgets", 40, "--file", file]
    code, out, err = streameval(capsys, *arguments, "--json", tmp_path / "out.json")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert re.search(message, err), err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgets", 4, 64], "--budgets 4 does not hold --sinks 4"),
        (["--budgets", 2, "--sinks", 0, "--policies", "recompute"], "--budgets 2 leaves no window .* at least 3"),
        (["--budgets", 129], "window 0.129 takes 129 positions and .* was made for 128; use --budgets 128 or less"),
        (["--budgets", 100_000], "was made for 128; use --budgets 128 or less"),  # more than the stream is long
        (["--budgets", 64, "--distractors", 20_000], "20000 distractors needs more numbers"),
        (["--file", "none.jsonl"], "--file is only for questions; add --task questions"),
        (["--task", "questions", "--file", "none.jsonl"], "none.jsonl does not exist"),
        (["--task", "questions", "--distances", 5], "--distances is only for --task lines"),
        (["--task", "questions", "--samples", 5], "--samples is only for --task lines"),
        (["--task", "questions", "--rows", 5], "--rows is only for --task lines"),
        (["--distances", 0], "--distances"),
        (["--queries", "many"], "--queries"),
        (["--policies", "snapkv"], "snapkv"),
        (["--every", 20_000], "needs more numbers"),
        (["--json", "none/out.json"], "none does not exist"),
    ],
)
def test_bad_input_is_one_line(runs, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    base = ["--sinks", 0, 4] if "--sinks" not in arguments else []
    sizes = [] if "questions" in arguments else ["--samples", 1] + ["--queries", 2] * ("--queries" not in arguments)
    code, out, err = streameval(capsys, "--model", runs[2], *base, *sizes, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert re.search(message, err), err
    assert not list(tmp_path.iterdir())


def test_logits_that_are_not_finite_are_no_answer(loaded, record):
    model = load_model(loaded.name).model
    model.model.norm.register_forward_hook(lambda _, args, out: out * float("nan"))
    samples = [record.sample(0, 0, 1, 1, 2, 2)]
    with pytest.raises(UserError, match="not finite"):
        measure_lines(model, choose(["sink"], [2], 60)[0], samples, 1, "")
