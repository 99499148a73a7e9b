"""Guards `sink-eval latency --prefill`: sides in turns, steps at the keys that rows name, bytes held, the crossover."""

from __future__ import annotations

import csv
import json
import math
import random
import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from eval.cli import main
from eval.commands.prefill import SLACK, report_growth
from eval.measures.prefill import measure as measuring
from eval.measures.prefill import prefill
from eval.measures.prefill.crossover import Times, crossover, crossover_interval, total
from eval.measures.prefill.measure import Side, dense_side, measure
from eval.measures.shape import config_of, load_shape, read_shape
from eval.measures.timing import BLOCK, Tokens
from sinkmodel.errors import UserError
from sinkmodel.loading import LoadedModel
from sinkmodel.memories import make_memory
from sinkmodel.results.latency import Crossover, PrefillRow, tokens_or_never
from sinkmodel.results.schema import from_json
from sinkmodel.sinks import SinkConfig
from tests import results, tiny
from tests.models import build, model_of
from tests.test_house import ROOT

SMALL = "model: {architecture: llama, layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 32, positions: 128, "
SMALL += "rotary_pct: 1.0, vocabulary: 50}\n"


@pytest.fixture
def shape(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def latency(capsys, *arguments) -> tuple[int, str, str]:
    return main(["latency", "--prefill", *map(str, arguments)]), *capsys.readouterr()


def sides_of(model, budget, *names, **settings) -> list[Side]:
    return [
        dense_side(),
        *(Side(name, budget, lambda name=name: make_memory(name, model, budget, **settings)) for name in names),
    ]


# ------------------------------------------------------------------------------------------------- the crossover


def test_an_answer_takes_its_first_token_and_a_step_for_each_other():
    """Guards totals by one step: the first token needs none, and costs between two places are on a straight line."""
    assert total(100.0, {1: 2.0, 5: 6.0}, 1) == 100.0
    assert total(100.0, {1: 2.0, 5: 6.0}, 2) == 102.0
    assert total(100.0, {1: 2.0, 5: 6.0}, 6) == 100.0 + 2 + 3 + 4 + 5 + 6
    assert total(100.0, {1: 2.0, 5: 6.0}, 8) == 100.0 + 20 + 6 + 6, "after the last place a step stays what it is"


def test_the_crossover_is_the_first_answer_that_takes_longer():
    """Guards off-by-ones on both sides of the last place that was measured, against a count token by token."""
    rng = random.Random(0)
    met = []
    for _ in range(60):
        one, other = ((rng.randint(1, 60), {1: rng.randint(1, 9), 6: rng.randint(1, 9)}) for _ in range(2))
        first, second = sorted((one, other), key=lambda side: side[0])
        longer = (n for n in range(2, 600) if total(*first, n) > total(*second, n))
        expected = 0 if first[0] == second[0] else next(longer, math.inf)
        assert crossover(first, second) == expected, (first, second)
        met.append(expected)
    assert sum(6 < n < math.inf for n in met) > 5
    assert sum(2 <= n <= 6 for n in met) > 5
    assert math.inf in met


def test_rounds_that_do_not_agree_widen_the_interval_of_a_crossover():
    """Guards a crossover that is noise from being read as a number."""
    dense = Times([100.0] * 6, {1: [2.0] * 6})
    sure = Times([50.0] * 6, {1: [3.0] * 6})
    assert crossover(sure.medians(), dense.medians()) == 52
    assert crossover_interval(sure, dense) == (52, 52)
    unsure = Times([50.0] * 6, {1: [1.9, 2.5, 2.0, 3.5, 1.8, 3.0]})
    low, high = crossover_interval(unsure, dense)
    assert low < crossover(unsure.medians(), dense.medians()) < high == math.inf
    late = Times([50.0, 120.0, 60.0, 99.0, 40.0, 130.0], {1: [3.0] * 6})
    low, high = crossover_interval(late, dense)
    assert low == 0, "the order of the first tokens is uncertain"
    assert high > crossover(late.medians(), dense.medians()) > 0
    assert crossover_interval(Times([50.0] * 4, {1: [3.0] * 4}), dense) is None


# ----------------------------------------------------------------------------------------------- the measurement


def test_sides_take_turns_and_ratios_are_of_one_round(monkeypatch):
    """Guards against noise: a round that is slow for all leaves ratios as they are, and each round draws its order."""
    cost, order = {"dense": 10.0, "snapkv": 20.0, "gemfilter": 5.0}, []

    def fake_read(model, side, prompt):
        slow = 1 + len(order) // 3
        order.append(side.memory)
        side.first.append(cost[side.memory] * slow)
        side.above.append(int(100 * cost[side.memory]))
        side.grown.append(10)
        return side.memory

    def fake_block(model, cache, tokens):
        return {"dense": 4.0, "snapkv": 1.0, "gemfilter": 1.0}[cache]

    monkeypatch.setattr(measuring, "read", fake_read)
    monkeypatch.setattr(measuring, "block", fake_block)
    monkeypatch.setattr(measuring, "_feed", lambda *_: None)
    model = model_of("llama")
    rows, crossovers = measure(LoadedModel(model, None, [], "m"), sides_of(model, 8, "snapkv", "gemfilter"), 20, [1, 3],
                               7, "prompt")  # fmt: skip
    rounds = [order[start : start + 3] for start in range(0, len(order), 3)]
    assert len(rounds) == 1 + 7, "one warms up"
    assert all(sorted(each) == sorted(cost) for each in rounds)
    assert len(set(map(tuple, rounds[1:]))) > 1
    dense, snapkv, gemfilter = rows
    assert (dense.ttft_ms, dense.ttft_ratio) == (50.0, None), "the warm-up does not count"
    assert (snapkv.ttft_ratio, snapkv.ttft_low, snapkv.ttft_high) == (2.0, 2.0, 2.0)
    assert gemfilter.ttft_ratio == 0.5
    assert [part.step_ratio for part in snapkv.answers] == [0.25, 0.25]
    assert [part.total_ms for part in snapkv.answers] == [100.0, 102.0]
    assert snapkv.peak_bytes - snapkv.reading_bytes == dense.peak_bytes - dense.reading_bytes > 10**7
    pairs = [(pair.first, pair.second, pair.crossover) for pair in crossovers]
    assert pairs == [("dense", "snapkv 8", 18), ("gemfilter 8", "dense", None), ("gemfilter 8", "snapkv 8", None)]


def test_steps_see_the_keys_of_their_place_and_are_taken_back(monkeypatch):
    """Guards what a step is compared at: N + n keys of dense, C + n of a memory, C of one that evicts; every round."""
    model, seen = build("llama"), []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, *args, **kwargs):
        seen.append((query.shape[2], key.shape[2]))
        return original(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    keys: dict[str, list[list[int]]] = {}
    block = measuring.block

    def spied(model, cache, tokens):
        seen.clear()
        took = block(model, cache, tokens)
        assert {query for query, _ in seen} == {1}
        keys.setdefault(type(cache).__name__, []).append([key for _, key in seen[:: model.config.num_hidden_layers]])
        return took

    monkeypatch.setattr(measuring, "block", spied)
    sides = sides_of(model, 8, "snapkv", "gemfilter", "h2o")
    sides[1].make = lambda: make_memory("snapkv", model, 8, window=4)
    measure(LoadedModel(model, None, [0], "m"), sides, 30, [1, 12], 2, "prompt")
    for name, at_end in (("DynamicCache", 1 + 30), ("SnapKV", 8), ("GemFilter", 8)):
        steps = [list(range(at_end + place, at_end + place + BLOCK + 1)) for place in (1, 1, 12, 12)]
        assert keys[name] == steps, name
    assert {key for steps in keys["H2O"] for key in steps} == {8 + 1}, "the new key, and then one is evicted"


def test_the_process_gives_back_what_a_memory_does_not_keep():
    """Guards "held": after a prompt the process has grown by the slots that are kept, not by the whole prompt."""
    model = build("llama", num_hidden_layers=8, hidden_size=64, max_position_embeddings=4096)
    loaded, budget = LoadedModel(model, None, [], "m"), 64
    rows, _ = measure(loaded, sides_of(model, budget, "snapkv", "gemfilter"), 2048, [1], 2, "prompt")
    dense, *memories = rows
    a_key = 8 * 2 * 2 * 16 * 4  # layers, KV heads, key and value, head size, bytes
    assert dense.bytes_held == dense.bytes_kept == 2048 * a_key
    assert dense.bytes_grown > 0.9 * dense.bytes_held
    for row in memories:
        assert row.bytes_kept == budget * a_key
        assert row.bytes_held < 1.1 * row.bytes_kept, "beside keys and values their positions alone"
        assert row.bytes_grown < row.bytes_held + 0.3 * dense.bytes_held
    assert dense.reading_bytes > dense.bytes_held


def test_what_a_process_keeps_is_measured_at_all():
    """Guards the test above: a cache that holds on to the prompt shows as growth."""
    model = build("llama", num_hidden_layers=8, hidden_size=64, max_position_embeddings=4096)
    hoard = []

    def make():
        memory = make_memory("snapkv", model, 64)
        compress = memory._compress
        memory._compress = lambda layer, seen: hoard.append(layer.held()) or compress(layer, seen)
        return memory

    side = Side("snapkv", 64, make)
    with torch.inference_mode():
        measuring.read(model, side, Tokens(model, []).first(2048))
    assert side.grown[0] > side.sizes[0] + 0.7 * 2048 * 8 * 2 * 2 * 16 * 4


def test_a_prompt_that_does_not_fit_is_one_line():
    """Guards a traceback from a GPU that is too small: the memory and the remedy are named."""
    model = model_of("llama")

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    sides = [dense_side(), Side("h2o", 8, full)]
    with pytest.raises(
        UserError, match="^h2o 8: a prompt of 20 tokens does not fit into the memory of cpu; use a shorter --length"
    ):
        measure(LoadedModel(model, None, [], "m"), sides, 20, [1], 1, "prompt")


# --------------------------------------------------------------------------------------------------- the command


def test_rows_answers_and_crossovers_come_with_every_length(tmp_path, capsys):
    """Guards the JSON, the CSV and the tables: dense first, each memory at each budget, the model's sinks on top."""
    tiny.checkpoint(tmp_path / "run", "llama", SinkConfig("token", 2))
    code, out, err = latency(capsys, "--model", tmp_path / "run", "--length", 60, 40, "--budgets", 36, "--layer", 1,
                             "--memories", "snapkv", "gemfilter", "--answers", 3, 1, "--rounds", 1,
                             "--json", tmp_path / "o.json", "--csv", tmp_path / "o.csv")  # fmt: skip
    assert code == 0, err
    assert "--rounds 1: fewer than 5 rounds give no interval" in err
    result = json.loads((tmp_path / "o.json").read_text())
    assert (result["command"], result["rounds"], result["threads"]) == ("latency --prefill", 1, torch.get_num_threads())
    labels = ["dense", "snapkv 36", "gemfilter 36"]
    assert [(row["label"], row["length"]) for row in result["rows"]] == [(x, n) for n in (40, 60) for x in labels]
    slot = 2 * 2 * 2 * 8 * 4
    assert [row["bytes_kept"] // slot for row in result["rows"]] == [2 + 40, 36, 36, 2 + 60, 36, 36]
    for row in result["rows"]:
        assert [part["answer"] for part in row["answers"]] == [1, 3]
        assert row["answers"][0]["total_ms"] == row["ttft_ms"] > 0
        assert (row["ttft_ratio"] is None) == (row["label"] == "dense")
        assert row["ttft_low"] is None
    assert len(result["crossovers"]) == 2 * 3
    with (tmp_path / "o.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["label"] for line in lines] == 2 * labels
    assert float(lines[1]["step_ms_3"]) == result["rows"][1]["answers"][1]["step_ms"]
    shown = " ".join(out.split())  # a long title has several lines
    for words in ("a prompt of 40 tokens", "a prompt of 60 tokens", "gemfilter 36", "falls behind at", "ms/step"):
        assert words in shown


def test_a_shape_is_made_where_and_as_it_runs(shape):
    """Guards the memory of the machine: a model of 8B in bf16 never exists in fp32."""
    model = load_shape(shape, "bfloat16", "cpu").model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    assert not model.training


def test_the_shape_of_llama_is_that_of_the_8b_model():
    """Guards the command for a GPU: sizes that are not Llama-3.1-8B's, or no room for an answer."""
    shape = read_shape(ROOT / "configs" / "models" / "llama-8b.yaml")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape))
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248
    assert make_memory("gemfilter", model, 1024).layer == 13
    assert shape.positions >= 131_072 + 1024 + BLOCK


def test_dense_is_plain_transformers():
    """Guards the baseline: ratios are to a cache with nothing of ours in it."""
    assert isinstance(dense_side().make(), DynamicCache)


def test_a_report_is_made_of_what_is_never(capsys):
    """Guards "never" against being read as "not measured", in the table and in the report."""
    pair = Crossover(length=64, first="a", second="b", crossover=None, low=12, high=None, rounds=5)
    assert pair.interval == "[12, never]"
    assert replace(pair, low=None).interval == "never"
    assert replace(pair, rounds=4).interval == "–"
    assert tokens_or_never(1234.0) == "1,234"


def test_a_process_that_has_kept_more_is_reported(capsys):
    """Guards a memory that holds on to the prompt: what the process does not give back is reported in a line."""
    content = next(row for row in results.prefill()["rows"] if row["label"] == "snapkv 8")
    row = replace(from_json(PrefillRow, content), bytes_grown=2**20 + SLACK)
    report_growth([row])
    assert capsys.readouterr().err == ""
    report_growth([replace(row, bytes_grown=2**26)])
    assert (
        "snapkv 8: after the prompt of 64 tokens the process has kept 63 MiB more than the memory holds"
        in capsys.readouterr().err
    )


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--budgets", 8, 40], "--budgets 40 keeps every token of --length 40"),
        (["--memories", "snap"], "invalid choice: 'snap'"),
        (["--memories", "dense"], "--memories has only dense"),
        (["--memories", "snapkv", "--layer", 1], "--layer is only for gemfilter"),
        (["--memories", "gemfilter", "--layer", 2], "gemfilter at --budgets 36: .*the model has layers 0 to 1"),
        (["--memories", "snapkv", "--budgets", 16], "snapkv at --budgets 16: .*does not hold 0 sinks and a window of"),
        (["--length", 120], "--length 120 and --answers 4 take 132 positions .* has 128; use 4 fewer"),
        (["--answers", 100], "--length 40 and --answers 100 take 148 positions"),
        (["--answers", 0], "--answers"),
        (["--rounds", 0], "--rounds"),
        (["--policies", "sink"], "--policies is not for --prefill; leave it out"),
        (["--stream-length", 99], "--stream-length is not for --prefill"),
        (["--plot", "x.png"], "--plot is not for --prefill"),
        (["--csv", "BAD/none/o.csv"], "--csv .*none does not exist"),
        (["--csv", "BAD/o.json", "--json", "BAD/o.json"], "--csv and --json are both"),
        (["--shape", "BAD/none.yaml"], "none.yaml does not exist"),
        (["--memory", "snapkv"], "did you mean --memories?"),
    ],
)
def test_bad_input_is_one_line_before_weights_are_made(shape, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.setattr(prefill, "load_shape", lambda *_: pytest.fail("weights were made"))
    base = {"--shape": [shape], "--length": [40], "--budgets": [36], "--memories": ["snapkv", "gemfilter"],
            "--answers": [4], "--json": [tmp_path / "out.json"]}  # fmt: skip
    given = [str(part).replace("BAD", str(tmp_path)) for part in changes]
    for word in given:
        base.pop(word, None)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = latency(capsys, *given, *(part for key, values in base.items() for part in (key, *values)))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert re.search(message, err), err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_loaded_model_is_checked_before_it_reads(tmp_path, capsys):
    """Guards a run that ends after minutes: positions count the model's sinks."""
    tiny.checkpoint(tmp_path / "run", "llama", SinkConfig("token", 2))
    code, _, err = latency(capsys, "--model", tmp_path / "run", "--length", 116, "--budgets", 36, "--answers", 4)
    assert (code, err.count("\n")) == (2, 1), err
    assert "take 130 positions with the timed steps" in err
    assert "has 128; use 2 fewer" in err


@pytest.mark.parametrize("option", [["--length", 9], ["--memories", "h2o"], ["--rounds", 2], ["--csv", "x.csv"]])
def test_options_of_prompts_are_refused_without_prefill(shape, capsys, option):
    """Guards an option that is given and does nothing."""
    code = main(["latency", "--shape", str(shape), *map(str, option)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert f"{option[0]} is only for --prefill; add that, or leave {option[0]} out" in err
