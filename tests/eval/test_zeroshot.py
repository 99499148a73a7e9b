"""Guards `sink-eval zeroshot`: the sinks stand in front of every window once, and the numbers are what they say."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import re
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import lm_eval.tasks
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from eval.cli import main
from eval.commands.zeroshot import choose
from eval.measures.harness import zeroshot
from eval.measures.harness.adapter import SinkLM, windows
from eval.measures.harness.files import in_memory
from eval.measures.harness.paper import PAPER, paper_accuracy
from eval.measures.harness.tasks import load_tasks
from sinkmodel.errors import UserError
from sinkmodel.loading import encode, load_model
from sinkmodel.models import transformers_config
from sinkmodel.shapes import ModelShape
from sinkmodel.sinks import SinkConfig, write_sink
from tests import tiny

POSITIONS = tiny.SHAPES["llama"].positions
SINKS = {0: "none", 1: "token", 2: "token"}
FAMILY = {0: "gpt_neox", 1: "gpt_neox", 2: "llama"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run folder for each number of sink tokens."""
    folders = {}
    for sinks, kind in SINKS.items():
        folders[sinks] = tmp_path_factory.mktemp(f"sinks{sinks}")
        tiny.checkpoint(folders[sinks], FAMILY[sinks], SinkConfig(kind, max(sinks, 1)))
    return folders


@pytest.fixture(scope="module")
def models(runs):
    return {sinks: load_model(str(run)) for sinks, run in runs.items()}


def write(folder: Path, name: str, rows: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def questions(count: int = 24, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        choices = [tiny.words(rng.randint(1, 4), seed=100 * i + j) + "." * j for j in range(3)]  # no two alike
        answer = rng.randrange(3)
        row = {"question": tiny.words(rng.randint(3, 9), seed=i), "choices": choices, "source": "is passed over"}
        rows.append({**row, "answer": answer if i % 2 else choices[answer]})
    return rows


def right_one(row: dict) -> int:
    return row["answer"] if isinstance(row["answer"], int) else row["choices"].index(row["answer"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of three tasks, one of each form; some of each are longer than the models' positions."""
    folder = tmp_path_factory.mktemp("data")
    long = [{**row, "question": tiny.words(50, seed=i) + "?"} for i, row in enumerate(questions(4, seed=1))]
    write(folder, "choice", questions() + long)
    contexts = [tiny.words(length, seed=length) for length in (1, 3, 8, 60)]
    write(folder, "last", [{"context": c, "continuation": " " + tiny.words(1, seed=9)} for c in contexts])
    write(folder, "texts", [{"text": tiny.words(length, seed=length)} for length in (5, 40, 90)])
    return folder


def measured(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["zeroshot", *map(str, arguments)])
    return (code, *capsys.readouterr())


def rows_of(capsys, tmp_path, *arguments) -> dict[tuple[str, str], dict]:
    code, _, err = measured(capsys, *arguments, "--json", tmp_path / "out.json")
    assert code == 0, err
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    return {(row["task"], row["metric"]): row for row in rows}


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


# --------------------------------------------------------------------------------------------------- what a window is


def test_windows_have_each_target_once_and_all_the_context_that_fits():
    assert list(windows([1, 2], [3, 4], 9)) == [([1, 2], [3, 4])]
    assert list(windows([1, 2, 3, 4, 5], [6, 7], 3)) == [([4, 5], [6, 7])], "cut from the left"
    assert list(windows([], [1, 2, 3, 4], 3)) == [([], [1, 2, 3, 4])], "the last is not fed"
    assert list(windows([], [1, 2, 3, 4, 5, 6, 7, 8, 9], 3)) == [
        ([], [1, 2, 3, 4]),
        ([4], [5, 6, 7]),
        ([6, 7], [8, 9]),
    ]
    assert list(windows([1], [2, 3, 4, 5], 3)) == [([1], [2, 3, 4]), ([2, 3, 4], [5])]
    assert list(windows([1, 2], [], 3)) == []


@pytest.mark.parametrize("seed", range(20))
def test_windows_of_any_length_are_whole(seed):
    rng = random.Random(seed)
    context, target = list(range(rng.randrange(12))), list(range(100, 100 + rng.randint(1, 40)))
    room = rng.randint(1, 9)
    found = list(windows(context, target, room))
    assert [token for _, scored in found for token in scored] == target
    tokens = context + target
    for read, scored in found:
        whole = read + scored
        place = tokens.index(scored[0]) - len(read)
        assert whole == tokens[place : place + len(whole)], "neighbours in the text"
        assert len(whole) - 1 == min(room, place + len(whole) - 1), "the room is filled if there is text to fill it"
        assert read or place == 0


# ------------------------------------------------------------------------------------------------ what the model reads


@pytest.fixture
def fed(models):
    """The rows that any of the models read, with their padding, and the one that was read last is the last."""
    rows: list[list[int]] = []

    def before(_, args, kwargs):
        ids_BT = args[0] if args else kwargs["input_ids"]
        if ids_BT.shape[1] > 1:  # not a step of generate
            rows.extend(ids_BT.tolist())

    hooks = [loaded.model.register_forward_pre_hook(before, with_kwargs=True) for loaded in models.values()]
    yield rows
    for hook in hooks:
        hook.remove()


LONG = tiny.words(110, seed=1)
PAIRS = {
    "short": (tiny.words(6), " " + tiny.words(2, seed=3)),
    "context too long": (LONG, " " + tiny.words(2, seed=3)),
    "no context": ("", tiny.words(4)),
    "blank context": ("  ", tiny.words(4)),
    "continuation too long": (tiny.words(6), " " + LONG),
    "all too long": (LONG, " " + LONG),
    "spells sinks": ("<|sink|><|sink2|> " + tiny.words(3), " <|sink|> " + tiny.words(2)),
    "one token": (tiny.words(6), "."),
}


def assert_sinks_once(rows: list[list[int]], loaded) -> None:
    assert rows
    sinks = len(loaded.sink_ids)
    for row in rows:
        assert row[:sinks] == loaded.sink_ids
        assert not set(row[sinks:]) & set(loaded.sink_ids)
        assert sinks < len(row) <= POSITIONS


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sinks", [1, 2])
def test_the_sinks_stand_in_front_of_every_scored_window_once(models, fed, sinks, batch):
    """Whatever the lengths: a cut from the left, an empty context or a text that spells a sink changes nothing."""
    lm = SinkLM(models[sinks], batch)
    for name, pair in PAIRS.items():
        fed.clear()
        lm.loglikelihood(requests("loglikelihood", pair), disable_tqdm=True)
        assert_sinks_once(fed, models[sinks])
        assert (len(fed) > 1) == (name in ("continuation too long", "all too long"))
    fed.clear()
    lm.loglikelihood(requests("loglikelihood", *PAIRS.values()), disable_tqdm=True)
    assert_sinks_once(fed, models[sinks])
    fed.clear()
    lm.loglikelihood_rolling(requests("loglikelihood_rolling", (LONG,), ("<|sink|>" + LONG,), ("a b",)))
    assert_sinks_once(fed, models[sinks])
    assert len(fed) > 5


def test_no_other_token_stands_for_an_empty_context(models, fed):
    """Whatever the tokenizer calls its first token: with another one than the sink, lm-eval would feed that too."""
    tokenizer = copy.deepcopy(models[1].tokenizer)
    tokenizer.bos_token = None
    lm = SinkLM(dataclasses.replace(models[1], tokenizer=tokenizer), 1)
    lm.loglikelihood(requests("loglikelihood", PAIRS["no context"]), disable_tqdm=True)
    assert fed == [models[1].sink_ids + encode(models[1], PAIRS["no context"][1])[:-1]]


@pytest.mark.parametrize("sinks", [1, 2])
def test_the_sinks_stand_in_front_of_every_prompt_once(models, fed, sinks):
    """After the padding of a batch too, and if a prompt is cut to leave room for what is generated."""
    lm = SinkLM(models[sinks], batch_size=4)
    prompts = [tiny.words(4), LONG, "<|sink|> " + tiny.words(9), "a"]
    given = {"until": ["\n"], "max_gen_toks": 5}
    lm.generate_until(requests("generate_until", *[(prompt, given) for prompt in prompts]), disable_tqdm=True)
    assert {len(row) for row in fed} == {POSITIONS - 5}
    pad = lm.tokenizer.pad_token_id
    rows = [row[next(i for i, token in enumerate(row) if token != pad) :] for row in fed]
    assert_sinks_once(rows, models[sinks])
    texts = sorted(([*encode(models[sinks], prompt)][-(POSITIONS - 5 - sinks) :] for prompt in prompts), key=len)
    assert sorted((row[sinks:] for row in rows), key=len) == texts


def test_stock_is_lm_evals_own_model_with_its_sinks_left_to_the_tokenizer(models, fed):
    """What the adapter is measured against, and why it is there; a new lm-eval may do better, then say so."""
    ways = zeroshot.language_models(models[1], batch_size=1)
    assert type(ways["stock"]) is HFLM
    (sink,) = models[1].sink_ids
    ways["stock"].loglikelihood(requests("loglikelihood", PAIRS["short"]), disable_tqdm=True)
    assert [row.count(sink) for row in fed] == [1]
    fed.clear()
    ways["stock"].loglikelihood(requests("loglikelihood", PAIRS["context too long"]), disable_tqdm=True)
    assert [row.count(sink) for row in fed] == [0]
    fed.clear()
    ways["stock"].loglikelihood_rolling(requests("loglikelihood_rolling", (LONG,)), disable_tqdm=True)
    assert sorted({row.count(sink) for row in fed}) == [0, 2]
    assert list(zeroshot.language_models(models[0], batch_size=1)) == ["stock"], "nothing to put in front"


# -------------------------------------------------------------------------------------------------- what it computes


def after(loaded, read: list[int]) -> torch.Tensor:
    """The log-probabilities [V] of the token after the sinks and what was read, by a plain forward."""
    with torch.no_grad():
        return loaded.model(torch.tensor([loaded.sink_ids + read])).logits[0, -1].log_softmax(-1)


def by_hand(loaded, context: str, continuation: str) -> tuple[float, bool]:
    """Token by token, of a continuation that fits into a window together with at least one token of context."""
    context, blanks = context.rstrip(), context[len(context.rstrip()) :]
    before = encode(loaded, context)
    ids = encode(loaded, context + blanks + continuation)
    room = POSITIONS - len(loaded.sink_ids)
    start = max(0, len(ids) - 1 - room)
    places = range(len(before), len(ids))
    found = [(after(loaded, ids[start:i]), ids[i]) for i in places]
    return sum(row_V[token].item() for row_V, token in found), all(row_V.argmax() == token for row_V, token in found)


@pytest.mark.parametrize("sinks", [1, 2])
def test_log_likelihoods_are_those_of_a_plain_forward(models, sinks):
    loaded = models[sinks]
    lm = SinkLM(loaded, batch_size=3)
    pairs = [pair for name, pair in PAIRS.items() if name not in ("continuation too long", "all too long")]
    found = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for pair, (nats, is_greedy) in zip(pairs, found):
        expected = by_hand(loaded, *pair)
        assert nats == pytest.approx(expected[0], abs=1e-4)
        assert is_greedy == expected[1]


@pytest.mark.parametrize("sinks", [1, 2])
def test_an_answer_is_greedy_where_all_its_windows_are(models, sinks):
    """By token ids, since what a random model says is hardly text."""
    loaded, room = models[sinks], POSITIONS - sinks
    generated: list[int] = []
    while len(generated) < room + 1:
        generated.append(int(after(loaded, generated).argmax()))
    another = (int(after(loaded, generated[-room:]).argmax()) + 1) % 300
    answers = SinkLM(loaded, 1)._loglikelihood_tokens(
        [(None, [], generated), (None, [], [*generated, another])], disable_tqdm=True
    )
    assert [is_greedy for _, is_greedy in answers] == [True, False]


@pytest.mark.parametrize("sinks", [1, 2])
def test_rolling_scores_every_token_once_with_the_sinks_in_front(models, sinks):
    """Token by token: the first window has room + 1 targets, later ones room, and the last as much context as fits."""
    loaded = models[sinks]
    room = POSITIONS - sinks
    texts = [LONG, tiny.words(10), tiny.words(30), ""]
    assert len(encode(loaded, LONG)) > 3 * POSITIONS
    found = SinkLM(loaded, batch_size=2).loglikelihood_rolling(
        requests("loglikelihood_rolling", *[(t,) for t in texts])
    )
    for text, nats in zip(texts, found):
        ids = encode(loaded, text)
        expected = 0.0
        for i, token in enumerate(ids):
            first = 0 if i <= room else room + 1 + (i - room - 1) // room * room
            end = min(first + room + (first == 0), len(ids))
            expected += after(loaded, ids[max(0, end - 1 - room) : i])[token].item()
        assert nats == pytest.approx(expected, abs=2e-3)


def test_a_continuation_longer_than_the_model_is_scored_whole(models):
    """Stock lm-eval stops with an assertion there."""
    loaded = models[1]
    context, continuation = PAIRS["continuation too long"]
    ((nats, _),) = SinkLM(loaded, 2).loglikelihood(
        requests("loglikelihood", (context, continuation)), disable_tqdm=True
    )
    before, ids = len(encode(loaded, context)), encode(loaded, context + continuation)
    expected, first, room = 0.0, before, POSITIONS - 1
    while first < len(ids):
        end = min(first + room, len(ids))
        expected += sum(after(loaded, ids[max(0, end - 1 - room) : i])[ids[i]].item() for i in range(first, end))
        first = end
    assert nats == pytest.approx(expected, abs=2e-3)


def test_generation_goes_on_from_the_sinks_and_the_prompt(models):
    loaded = models[2]
    prompts = [tiny.words(4), tiny.words(12, seed=2)]
    given = {"until": ["\n\n"], "max_gen_toks": 6}
    found = SinkLM(loaded, 2).generate_until(requests("generate_until", *[(p, given) for p in prompts]), True)
    for prompt, text in zip(prompts, found):
        ids = encode(loaded, prompt)
        for _ in range(6):
            ids.append(int(after(loaded, ids).argmax()))
        expected = loaded.tokenizer.decode(ids[len(encode(loaded, prompt)) :], skip_special_tokens=True)
        assert text == expected.split("<|endoftext|>")[0].split("\n\n")[0]


def test_a_task_that_generates_is_answered_as_the_others_are(models):
    """Guards the command's own path, with its progress, for the one kind of task that no local file makes."""
    loaded, prompts = models[1], [tiny.words(4), tiny.words(12, seed=2)]
    given = {"until": ["\n\n"], "max_gen_toks": 6}
    lm = SinkLM(loaded, 2)
    generated = lm.generate_until(
        requests("generate_until", *[(prompt, given) for prompt in prompts]), disable_tqdm=True
    )
    rows = [{"prompt": prompts[0], "gold": generated[0]}, {"prompt": prompts[1], "gold": "something else"}]
    task = ConfigurableTask(
        config={
            "task": "t",
            "output_type": "generate_until",
            "doc_to_text": itemgetter("prompt"),
            "doc_to_target": itemgetter("gold"),
            "generation_kwargs": given,
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            **in_memory(rows),
        }
    )
    scores, count = zeroshot.answer(lm, "t", task, None, "t")
    assert (scores["exact_match", "none"][0], count) == (0.5, 2)


# ------------------------------------------------------------------------------------------------------- local tasks


def test_tasks_of_files_give_what_a_direct_computation_gives(runs, models, data, tmp_path, capsys):
    loaded = models[2]
    rows = rows_of(capsys, tmp_path, "--model", runs[2], "--data", data, "--batch-size", 3)
    assert {task for task, _ in rows} == {"choice", "last", "texts"}
    asked = [json.loads(line) for line in (data / "choice.jsonl").read_text().splitlines()]
    nats = [[by_hand(loaded, row["question"], " " + choice)[0] for choice in row["choices"]] for row in asked]
    lengths = [[len(choice) for choice in row["choices"]] for row in asked]
    for metric, scores in (
        ("acc", nats),
        ("acc_norm", [[x / n for x, n in zip(*pair)] for pair in zip(nats, lengths)]),
    ):
        right = [scored.index(max(scored)) == right_one(row) for scored, row in zip(scores, asked)]
        accuracy, n = sum(right) / len(right), len(right)
        assert 0 < accuracy < 1
        assert rows["choice", metric]["adapter"] == pytest.approx(accuracy)
        assert rows["choice", metric]["adapter_stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (n - 1)))
        assert rows["choice", metric]["questions"] == n == 28
    pairs = [json.loads(line) for line in (data / "last.jsonl").read_text().splitlines()]
    answers = [by_hand(loaded, row["context"], row["continuation"]) for row in pairs]
    assert rows["last", "acc"]["adapter"] == sum(right for _, right in answers) / len(answers)
    mean = sum(nats for nats, _ in answers) / len(answers)
    assert rows["last", "perplexity"]["adapter"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert rows["last", "perplexity"]["adapter_stderr"] > 0
    texts = [json.loads(line)["text"] for line in (data / "texts.jsonl").read_text().splitlines()]
    total = sum(SinkLM(loaded, 1).loglikelihood_rolling(requests("loglikelihood_rolling", *[(t,) for t in texts])))
    bits = -total / sum(len(text.encode()) for text in texts) / math.log(2)
    assert rows["texts", "bits_per_byte"]["adapter"] == pytest.approx(bits, rel=1e-5)
    assert rows["texts", "byte_perplexity"]["adapter"] == pytest.approx(2**bits, rel=1e-5)
    assert rows["texts", "bits_per_byte"]["adapter_stderr"] is None


def test_stock_numbers_are_those_of_lm_evals_own_model(runs, models, data, tmp_path, capsys):
    """Guards the column that readers compare with numbers from elsewhere; it differs from the adapter's."""
    rows = rows_of(capsys, tmp_path, "--model", runs[1], "--data", data, "--batch-size", 1)
    lm = HFLM(models[1].model, tokenizer=models[1].tokenizer)
    asked = [json.loads(line) for line in (data / "choice.jsonl").read_text().splitlines()]
    right = []
    for row in asked:
        pairs = [(row["question"], " " + choice) for choice in row["choices"]]
        nats = [answer[0] for answer in lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)]
        right.append(nats.index(max(nats)) == right_one(row))
    assert rows["choice", "acc"]["stock"] == pytest.approx(sum(right) / len(right))
    texts = [json.loads(line)["text"] for line in (data / "texts.jsonl").read_text().splitlines()]
    total = sum(lm.loglikelihood_rolling(requests("loglikelihood_rolling", *[(t,) for t in texts]), disable_tqdm=True))
    bits = -total / sum(len(text.encode()) for text in texts) / math.log(2)
    assert rows["texts", "bits_per_byte"]["stock"] == pytest.approx(bits, rel=1e-6)
    assert abs(rows["texts", "bits_per_byte"]["adapter"] - bits) > 1e-3


@pytest.mark.parametrize("kind", ["none", "logit"])
def test_without_sink_tokens_the_adapters_numbers_are_stocks(kind, data, tmp_path, capsys):
    tiny.checkpoint(tmp_path, "llama", SinkConfig(kind))
    code, out, _ = measured(capsys, "--model", tmp_path, "--data", data, "--json", tmp_path / "o.json")
    assert code == 0
    assert "no sink token: adapter = stock" in " ".join(out.split())
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert len(rows) == 6
    for row in rows:
        assert (row["adapter"], row["adapter_stderr"]) == (row["stock"], row["stock_stderr"])


def test_the_same_command_writes_the_same_file_and_a_batch_changes_nothing(runs, data, tmp_path, capsys):
    arguments = ["--model", runs[1], "--data", data, "--tasks", "last", "choice", "--limit", 6]
    files = []
    for batch in (2, 2, 5):
        path = tmp_path / "o.json"
        code, out, err = measured(capsys, *arguments, "--batch-size", batch, "--json", path)
        assert code == 0
        assert err == f"wrote {path}\n", "nothing of lm-eval's own on the screen"
        assert out.count("choice") == out.count("last") == 2
        files.append(re.sub(r'"date": "[^"]*"', "", path.read_text()))
    assert files[0] == files[1]
    first, other = (json.loads(re.sub(r",\s*,", ",", text)) for text in (files[0], files[2]))
    assert [row["task"] for row in first["rows"]] == ["last", "last", "choice", "choice"], "as --tasks has them"
    assert [row["questions"] for row in first["rows"]] == [4, 4, 6, 6]
    for row, again in zip(first["rows"], other["rows"]):
        assert row["adapter"] == pytest.approx(again["adapter"], rel=1e-4)
    assert [entry["task"] for entry in first["files"]] == ["last", "choice"]


# -------------------------------------------------------------------------------------------------- the paper's tasks


ROWS = {  # one row of each data set, and the requests that lm-eval makes of it, the right one first
    "arc_easy": (
        {"question": "Q?", "choices": {"text": ["no", "yes"], "label": ["A", "B"]}, "answerKey": "B"},
        [("Question: Q?\nAnswer:", " yes"), ("Question: Q?\nAnswer:", " no")],
    ),
    "hellaswag": (
        {"activity_label": "Act", "ctx_a": "He [x] runs", "ctx_b": "and", "endings": ["falls", "rests"], "label": "0"},
        [("Act: He runs And", " falls"), ("Act: He runs And", " rests")],
    ),
    "lambada_openai": ({"text": "a long last word"}, [("a long last", " word")]),
    "openbookqa": (
        {"question_stem": "Stem", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"},
        [("Stem", " x"), ("Stem", " y")],
    ),
    "piqa": (
        {"goal": "G", "sol1": "one", "sol2": "two", "label": 1},
        [("Question: G\nAnswer:", " two"), ("Question: G\nAnswer:", " one")],
    ),
    "winogrande": (
        {"sentence": "As _ fell, it broke", "option1": "A", "option2": "B", "answer": "2"},
        [("As B", " fell, it broke"), ("As A", " fell, it broke")],
    ),
}
ROWS["arc_challenge"] = ROWS["arc_easy"]


def test_the_papers_tasks_are_lm_evals_on_rows_of_their_data_sets(tmp_path, runs, capsys):
    """Guards that a copied data set gives the published task, with its own prompts, and that no Hub is asked."""
    for name, (row, _) in ROWS.items():
        write(tmp_path / "data", name, [row, row])
    names, files = choose(["paper"], tmp_path / "data")
    assert names == list(files) == list(PAPER)
    for name, task in load_tasks(names, files).items():
        task.build_all_requests(limit=1)
        made = [instance.args for instance in task.instances]
        right, *others = ROWS[name][1]
        assert sorted(made) == sorted([right, *others])
        answers = [(0.0 if pair == right else -9.0, pair == right) for pair in made]
        assert task.process_results(task.instances[0].doc, answers)["acc"] == 1.0
    code, out, err = measured(capsys, "--model", runs[1], "--tasks", "paper", "--data", tmp_path / "data", "--limit", 1)
    assert code == 0, err
    assert all(name in out for name in PAPER)


def test_the_papers_numbers_stand_beside_the_same_questions_alone():
    assert paper_accuracy("piqa", "acc", 1838, 0) == 0.622
    assert paper_accuracy("piqa", "acc", 1838, 1) == 0.626
    assert paper_accuracy("lambada_openai", "acc", 5153, 2) == 0.375
    assert paper_accuracy("piqa", "acc", 1837, 0) is None, "not all of them"
    assert paper_accuracy("piqa", "acc_norm", 1838, 0) is None
    assert paper_accuracy("piqa", "acc", 1838, 4) is None
    assert paper_accuracy("mine", "acc", 1838, 0) is None


@pytest.mark.parametrize(
    ("shape", "kind", "paper"),
    [
        (ModelShape(), "none", 0.622),
        (ModelShape(), "token", 0.626),
        (ModelShape(), "logit", None),
        (ModelShape(), "zero", None),
        (ModelShape("llama", 32, 4096, 32, 8, 14336, 8192, 1.0), "none", None),  # Llama-3-8B
        (
            ModelShape(layers=24, hidden=1024, heads=16, kv_heads=16, ffn=4096),
            "token",
            None,
        ),  # Pythia-410M's, and a sink
    ],
)
def test_a_model_or_sink_that_the_paper_did_not_ask_has_no_number_of_the_paper(shape, kind, paper):
    """Risk: 0.622, of 160M parameters, beside any vanilla model."""
    sink, ids = SinkConfig(kind), [7] if kind == "token" else []
    config = transformers_config(shape, 50304, sink)
    write_sink(config, sink, ids)
    loaded = SimpleNamespace(model=SimpleNamespace(config=config), sink_ids=ids)
    (row,) = zeroshot.rows_of(loaded, "piqa", 1838, {"stock": {("acc", "none"): (0.5, None)}})
    assert row.paper == paper


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture
def bad(tmp_path):
    for name, lines in {
        "nothing": "",
        "broken": '{"text": "a"}\n{"text": ',
        "list": "[1]",
        "keys": '{"prompt": "a"}',
        "index": '{"question": "a", "choices": ["b", "c"], "answer": 2}',
        "alone": '{"question": "a", "choices": ["b"], "answer": 0}',
        "bool": '{"question": "a", "choices": ["b", "c"], "answer": true}',
        "mixed": '{"text": "a"}\n{"context": "a", "continuation": "b"}',
        "piqa": '{"goal": "G", "sol1": "one", "label": 1}',
        "winogrande": '{"sentence": "no gap", "option1": "one", "option2": "two", "answer": "1"}',
        "blank": '{"context": " ", "continuation": " a"}',
        "long": json.dumps({"context": "a", "continuation": " " + tiny.words(60)}),
        "joined": '{"context": "a b", "continuation": " c"}\n{"context": "he said c", "continuation": "u"}',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.jsonl").write_text(lines)
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "inner" / "folder.jsonl").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--data", "BAD/none"], "--data .*none is not a folder"),
        (["--data", "BAD/empty"], "empty has no .jsonl file in it"),
        (["--data", "BAD/nothing"], "nothing.jsonl has no rows"),
        (["--data", "BAD/broken"], "broken.jsonl:2: not a JSON object"),
        (["--data", "BAD/list"], "list.jsonl:1: not a JSON object"),
        (["--data", "BAD/inner"], "folder.jsonl is a folder, not a file"),
        (["--data", "BAD/latin"], "latin.jsonl is not UTF-8"),
        (["--data", "BAD/keys"], "keys.jsonl: a row has the keys prompt; it needs question, choices and answer, or"),
        (
            ["--data", "BAD/index"],
            "index.jsonl, row 1: 'answer' is neither one of the choices nor an index from 0 to 1",
        ),
        (["--data", "BAD/bool"], "bool.jsonl, row 1: 'answer'"),
        (["--data", "BAD/alone"], "alone.jsonl, row 1: 'choices' is not a list of two or more texts"),
        (["--data", "BAD/mixed"], "mixed.jsonl, row 2: 'text' is not a text"),
        (["--data", "BAD/piqa"], "piqa.jsonl, row 1: no key 'sol2', which the rows of piqa have"),
        (["--data", "BAD/winogrande"], "winogrande.jsonl: lm-eval's winogrande cannot read these rows .ValueError"),
        (["--data", "BAD/blank"], "blank.jsonl, row 1: 'context' is not a text"),
        (["--data", "BAD/long"], "task long, question 1: the answer .* is longer than the 128 positions of the model"),
        (["--data", "BAD/joined"], "task joined, question 2: the answer 'u' adds no token to its context 'he said c'"),
        (["--limit", 0], "--limit"),
        (["--batch-size", 0], "--batch-size"),
        (["--json", "BAD/none/out.json"], "none does not exist"),
        (["--model", "BAD/none"], "none is not a folder"),
        (["--task", "piqa"], "unknown option --task; did you mean --tasks"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(runs, data, bad, capsys, changes, message):
    base = {"--model": runs[0], "--data": data, "--json": bad / "out.json"}
    given = [str(part).replace("BAD", str(bad)) for part in changes]
    for option in given:
        base.pop(option, None)
    before = sorted(bad.rglob("*"))
    code, out, err = measured(capsys, *given, *(part for pair in base.items() for part in pair))
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert re.search(message, err), err
    assert sorted(bad.rglob("*")) == before


def test_no_task_and_an_unknown_task_are_one_line(runs, capsys, monkeypatch):
    code, _, err = measured(capsys, "--model", runs[0])
    assert (code, err.count("\n")) == (2, 1)
    assert "no task is named; give --tasks" in err
    whole = lm_eval.tasks.TaskManager
    few = Path(lm_eval.tasks.__file__).parent / "piqa"  # all 14,000 take half a minute
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda: whole(include_defaults=False, include_path=str(few)))
    code, _, err = measured(capsys, "--model", runs[0], "--tasks", "pika")
    assert (code, err.count("\n")) == (2, 2)
    assert "lm-eval has no task pika, and --data has no file pika.jsonl; did you mean piqa?" in err


def test_a_data_set_that_cannot_be_reached_is_one_line(runs, capsys, monkeypatch):
    def unreachable(path, **_):
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    code, _, err = measured(capsys, "--model", runs[0], "--tasks", "paper")
    assert (code, err.count("\n")) == (2, 2)
    assert err.startswith("loading the data of arc_challenge\n")
    assert "task arc_challenge: its data cannot be loaded (ConnectionError: Couldn't reach 'allenai/ai2_arc'" in err
    assert "set HF_HOME" in err
    assert "arc_challenge.jsonl in the folder of --data" in err


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (math.nan, "in float32 gives logits that are not finite; its weights are damaged"),
        (1e3, "the perplexity of a continuation overflows"),
    ],
)
def test_numbers_that_are_none_are_one_line(runs, data, tmp_path, capsys, monkeypatch, scale, message):
    """Guards against an accuracy of argmaxes over NaN, and a traceback from a perplexity above e^709."""
    loaded = load_model(str(runs[1]))
    loaded.model.get_output_embeddings().weight[3:] *= scale
    monkeypatch.setattr(zeroshot, "load", lambda options: loaded)
    code, _, err = measured(
        capsys, "--model", runs[1], "--data", data, "--tasks", "last", "--json", tmp_path / "o.json"
    )
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not (tmp_path / "o.json").exists()


def test_a_task_that_fails_takes_no_finished_one_along(runs, data, tmp_path, capsys, monkeypatch):
    """Risk: hours of answers lost to what nobody could know before."""

    def fail_in(lm, name, *others):
        if name == "last":
            raise UserError("no more")
        return answer(lm, name, *others)

    answer = zeroshot.answer
    monkeypatch.setattr(zeroshot, "answer", fail_in)
    out = tmp_path / "o.json"
    code, table, err = measured(
        capsys, "--model", runs[1], "--data", data, "--tasks", "texts", "last", "choice", "--json", out
    )
    assert code == 2
    assert "no more" in err
    assert "texts" in table
    assert {row["task"] for row in json.loads(out.read_text())["rows"]} == {"texts"}


def test_a_task_that_generates_more_than_the_model_has_positions_is_one_line(models):
    task = SimpleNamespace(OUTPUT_TYPE="generate_until", config=SimpleNamespace(generation_kwargs={"until": ["x"]}))
    lm = SinkLM(models[1], 1)
    with pytest.raises(UserError, match="generate 256 tokens, and it was made for 128 positions"):
        zeroshot.check_room("gsm8k", task, lm, 1)
    task.config.generation_kwargs["max_gen_toks"] = 126
    zeroshot.check_room("gsm8k", task, lm, 1)
    task.config.generation_kwargs["max_gen_toks"] = 127
    with pytest.raises(UserError, match="leaves none for the question"):
        zeroshot.check_room("gsm8k", task, lm, 1)
