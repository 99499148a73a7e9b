"""Guards `sink-eval memories`: the same prompts and targets for all, losses as by hand, one line for mistakes."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch

from eval.cli import main
from eval.measures.memories.measure import Question, places
from sinkmodel import StreamingCache
from sinkmodel.loading import encode, load_model
from sinkmodel.memories import make_memory
from sinkmodel.sinks import SinkConfig
from tests import tiny

PROMPT, AFTER, BUDGET = 30, 13, 12
SETTINGS = {"snapkv": {"window": 4}}
NAMES = ("dense", "sink", "snapkv", "h2o", "tova", "expected-attention", "gemfilter")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tiny.checkpoint(folder, "llama", SinkConfig("token"))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": tiny.words(200, seed)}) + "\n" for seed in range(6)))
    return path


def memories(capsys, *arguments) -> tuple[int, str, str]:
    return main(["memories", *map(str, arguments)]), *capsys.readouterr()


def result(capsys, tmp_path, run, texts, *arguments) -> dict:
    sizes = ["--prompt", PROMPT, "--continue", AFTER, "--budgets", BUDGET, "--window", 4]
    code, _, err = memories(
        capsys, "--model", run, "--text", texts, *sizes, *arguments, "--json", tmp_path / "out.json"
    )
    assert code == 0, err
    return json.loads((tmp_path / "out.json").read_text())


@torch.no_grad()
def losses(loaded, make, ids) -> torch.Tensor:
    """Of the tokens after the prompt, fed one by one."""
    cache = make()
    front = len(loaded.sink_ids)
    middle = front + PROMPT
    text = torch.tensor([[*loaded.sink_ids, *ids]])
    if hasattr(cache, "expect"):
        cache.expect(middle)
    logits = [loaded.model(text[:, :middle], past_key_values=cache).logits[0, -1]]
    for at in range(middle, middle + AFTER - 1):
        logits.append(loaded.model(text[:, at : at + 1], past_key_values=cache).logits[0, -1])
    return torch.nn.functional.cross_entropy(torch.stack(logits), text[0, middle : middle + AFTER], reduction="none")


@pytest.mark.parametrize("positions", ["text", "cache"])
def test_every_row_is_the_loss_of_the_same_tokens(run, texts, tmp_path, capsys, positions):
    found = result(capsys, tmp_path, run, texts, "--memories", *NAMES, "--positions", positions)
    loaded = load_model(str(run))
    rows = {row["memory"]: row for row in found["rows"]}
    assert list(rows) == list(NAMES)
    documents = [encode(loaded, json.loads(line)["text"]) for line in texts.read_text().splitlines()]
    dense = torch.stack([losses(loaded, lambda: make_memory("dense", loaded.model), ids) for ids in documents])
    for name in NAMES:

        def make(name=name):
            if name == "sink":
                return StreamingCache(loaded.model, BUDGET, 1, positions)
            if name == "dense":
                return make_memory(name, loaded.model)
            settings = {"window": 4} | ({} if name == "gemfilter" else {"positions": positions})
            return make_memory(name, loaded.model, BUDGET, **settings)

        expected = torch.stack([losses(loaded, make, ids) for ids in documents])
        assert rows[name]["nll"] == pytest.approx(expected.mean().item(), abs=1e-5), name
        assert (rows[name]["prompts"], rows[name]["documents"], rows[name]["tokens"]) == (6, 6, 6 * AFTER)
        if name != "dense":
            difference = (expected - dense).mean().item()
            assert rows[name]["difference"] == pytest.approx(difference, abs=1e-5)
            assert rows[name]["low"] < rows[name]["difference"] < rows[name]["high"]
            assert rows[name]["answer"] in ("equivalent", "better", "worse", "undecided")
            assert rows[name]["bytes_kept"] < rows["dense"]["bytes_kept"]
            assert rows[name]["prefill_ratio"] > 0
            assert rows[name]["keys_kept"] == BUDGET
    assert rows["dense"]["difference"] is None
    assert rows["dense"]["keys_kept"] == 1 + PROMPT, "the sink"
    a_key = rows["dense"]["bytes_kept"] / (2 * (1 + PROMPT))
    assert rows["sink"]["bytes_held"] == (2 * BUDGET + 1) * a_key, "keys, values, and the sink's original key"
    assert rows["sink"]["bytes_kept"] == 2 * BUDGET * a_key


def test_few_documents_decide_nothing_about_others(run, texts, tmp_path, capsys):
    """Whatever their interval says; but about these texts an answer is allowed."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"text": tiny.words(400, seed)}) + "\n" for seed in range(3)))
    margin = ("--margin", 100, "--prompts", 4)
    assert result(capsys, tmp_path, run, few, "--memories", "tova", *margin)["rows"][1]["answer"] == "undecided"
    answered = result(capsys, tmp_path, run, few, "--memories", "tova", *margin, "--these-texts")["rows"][1]
    assert answered["answer"] == "equivalent"
    enough = result(capsys, tmp_path, run, texts, "--memories", "tova", "--margin", 100)["rows"][1]
    assert enough["answer"] == "equivalent"


def test_recompute_reads_its_window_again_for_each_token(run, texts, tmp_path, capsys):
    found = result(capsys, tmp_path, run, texts, "--memories", "recompute", "--stride", 1)
    loaded = load_model(str(run))
    total = []
    for line in texts.read_text().splitlines():
        ids = encode(loaded, json.loads(line)["text"])
        for target in range(PROMPT, PROMPT + AFTER):
            window = [*loaded.sink_ids, *ids[target - BUDGET + 1 : target]]
            with torch.no_grad():
                logits = loaded.model(torch.tensor([window])).logits[0, -1]
            total.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[target])).item())
    assert found["rows"][1]["nll"] == pytest.approx(sum(total) / len(total), abs=1e-5)


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_as_published_a_memory_holds_as_many_times_more_as_heads_share_a_key(run, texts, tmp_path, capsys, name):
    found = result(capsys, tmp_path, run, texts, "--memories", name, f"{name}-as-published")
    ours, published = (row["bytes_kept"] for row in found["rows"][1:])
    assert found["rows"][1]["keys_kept"] == found["rows"][2]["keys_kept"] == BUDGET
    config = load_model(str(run)).model.config
    assert published == ours * config.num_attention_heads // config.num_key_value_heads > ours


def test_prompts_of_a_document_are_spread_and_do_not_overlap():
    question = Question(30, 10, 0.01, 0.95, 0, False)
    assert places([range(1 + 200), range(1 + 40), range(1 + 79)], 1, question, 3) == [[1, 81, 161], [1], [1]]


def test_the_table_the_csv_and_the_picture(run, texts, tmp_path, capsys):
    arguments = ["--memories", "snapkv", "window", "--csv", tmp_path / "a.csv", "--plot", tmp_path / "a.png"]
    result(capsys, tmp_path, run, texts, *arguments)
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["dense", "snapkv 12", "window 12"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    sizes = ["--prompt", PROMPT, "--continue", AFTER, "--budgets", BUDGET, "--window", 4]
    _, out, _ = memories(capsys, "--model", run, "--text", texts, *sizes, "--memories", "snapkv")
    dense, snapkv = (
        next(line for line in out.splitlines() if line.split()[:1] == [name]) for name in ("dense", "snapkv")
    )
    assert dense.split()[5] == str(1 + PROMPT), "keys"
    assert snapkv.split()[:2] == ["snapkv", "12"]
    assert "12" in snapkv.split()[6:]
    assert re.search(r"dense\s+takes\s+[\d.,]+\s+ms\s+for\s+a\s+prompt\s+and\s+[\d.,]+\s+ms\s+for\s+a\s+token", out)
    assert max(map(len, out.splitlines())) <= 140


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--memories", "snapkv"], "snapkv at --budgets 12: a budget of 12 does not hold 0 sinks and a window of 32"),
        (["--memories", "recompute", "--stride", "13"], "--stride 13 does not fit into --budgets 12"),
        (["--memories", "sink", "--sinks", "12"], "--budgets 12 holds only the --sinks 12 of sink"),
    ],
)
def test_a_budget_that_is_too_small_is_one_line_before_a_model_is_loaded(texts, capsys, changes, message):
    sizes = ["--prompt", PROMPT, "--continue", AFTER, "--budgets", BUDGET]
    code, out, err = memories(capsys, "--model", "no-such-model", "--text", texts, *sizes, *changes)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--budgets", "31"], "--budgets 31 keeps every token of --prompt 30"),
        (["--memories", "snap"], "invalid choice: 'snap'"),
        (["--level", "1"], "--level is 1.0"),
        (["--margin", "0"], "--margin is 0"),
        (["--plot", "a.jpg"], "is not a .png"),
        (["--json", "/nowhere/a.json"], "does not exist"),
        (["--memories", "snapkv", "--window", "13"], "does not hold 0 sinks and a window of 13"),
        (["--memories", "gemfilter", "--layer", "9"], "layer 9"),
        (["--memories", "recompute", "--stride", "12"], "--stride 12"),
        (["--prompt", "4000", "--window", "4"], "--prompt and --continue take"),
    ],
)
def test_bad_input_is_one_line(run, texts, capsys, changes, message):
    sizes = ["--prompt", PROMPT, "--continue", AFTER, "--budgets", BUDGET]
    code, out, err = memories(capsys, "--model", run, "--text", texts, *sizes, *changes)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") <= 2
