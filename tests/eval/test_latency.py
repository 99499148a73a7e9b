"""Guards `sink-eval latency`: every side is timed at the same number of keys, in turns, and rows say what was done."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from statistics import median

import pytest
import torch

from eval.cli import main
from eval.commands.latency import POINTS
from eval.measures import latency, timing
from eval.measures.statistics import paired_ratio, quantile
from eval.policies.choice import choose
from sinkmodel.errors import UserError
from sinkmodel.loading import load_model
from sinkmodel.sinks import SinkConfig
from tests import tiny
from tests.models import build, model_of

NAMES = ["dense", "recompute", "window", "sink"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run folder of a small Llama with two sink tokens."""
    folder = tmp_path_factory.mktemp("llama")
    tiny.checkpoint(folder, "llama", SinkConfig("token", 2))
    return folder


def measured(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["latency", *map(str, arguments)])
    return (code, *capsys.readouterr())


# --------------------------------------------------------------------------------------------------- the measurement


@pytest.fixture
def attention(monkeypatch):
    """(query length, key length) of every attention, as a list that a test may empty."""
    seen: list[tuple[int, int]] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, *args, **kwargs):
        seen.append((query.shape[2], key.shape[2]))
        return original(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return seen


@pytest.mark.parametrize("budget", [8, 40])
def test_every_timed_query_sees_as_many_keys_as_the_row_says(budget, attention, monkeypatch):
    """Guards the comparison: dense does not creep up, caches are full, recompute reads C tokens and no more."""
    model = model_of("llama")
    policies = choose(NAMES, [2], budget, front=1)
    sides = [timing.full_side(model, policy, budget, [0]) for policy in policies]
    during, original = {}, timing.step

    def spied(side, ids):
        attention.clear()
        took = original(side, ids)
        during.setdefault(side.policy.name, []).extend(attention)
        return took

    monkeypatch.setattr(timing, "step", spied)
    timing.alternate(sides, timing.Tokens(model, [0]), rounds=2, on_step=lambda _: None)
    layers = model.config.num_hidden_layers
    steps = 2 * (timing.BLOCK + 1)  # two rounds, each with a step that is not timed
    assert during["dense"] == during["window"] == during["sink"] == [(1, budget)] * steps * layers
    assert during["recompute"] == [(budget, budget)] * 2 * layers
    assert [len(side.steps) for side in sides] == [16, 2, 16, 16]
    assert all(side.policy.row(budget).keys_seen == budget for side in sides)
    kept = sides[1].stream.ids_BT
    assert kept.shape == (1, budget)
    assert kept[0, 0] == 0, "the model's sink is in front of what is read again"
    assert sides[3].stream.cache.get_seq_length() == budget + steps, "and the stream has gone on"


def test_a_step_computes_one_place_of_the_head():
    """Guards recompute's time: no [1, C, V] logits."""
    model, rows = build("gpt_neox"), []
    sides = [timing.full_side(model, policy, 12, []) for policy in choose(NAMES, [1], 12)]
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: rows.append(out.shape[:2]))
    timing.alternate(sides, timing.Tokens(model, []), rounds=1, on_step=lambda _: None)
    assert set(rows) == {(1, 1)}


def test_sides_take_turns_and_ratios_are_of_blocks_of_one_round(monkeypatch):
    """Guards against noise: a round that is twice as slow for all leaves every ratio as it is."""
    order, slow = [], iter([1.0, 1.0, 1.0, 1.0, 1.0, 40.0, 1.0])
    cost = {"dense": 8.0, "recompute": 30.0, "window": 9.0, "sink": 10.0}
    now = {"round": 0.0}

    def fake(side, ids):
        order.append(side.policy.name)
        return cost[side.policy.name] * now["round"]

    monkeypatch.setattr(timing, "step", fake)
    sides = [timing.Side(policy, None) for policy in choose(NAMES, [4], 16)]
    tokens = timing.Tokens(model_of("llama"), [])
    for now["round"] in slow:
        timing.alternate(sides, tokens, 1, lambda _: None)
    assert [len(side.blocks) for side in sides] == [7] * 4
    for start in range(0, len(order), 3 * 9 + 1):
        blocks = [name for i, name in enumerate(order[start : start + 28]) if i == 0 or order[start + i - 1] != name]
        assert sorted(blocks) == sorted(NAMES), "each has one block a round"
        assert blocks[0] == "recompute", "the slow one does not stand between the quick ones"
    found = timing.ratio(sides[1], sides[3])
    assert found == {"ratio": "recompute/sink", "value": 3.0, "low": 3.0, "high": 3.0, "rounds": 7}
    assert timing.times(sides[0]) == {"tokens": 56, "ms_per_token": 8.0, "ms_per_token_p99": 320.0}


def test_the_order_of_the_sides_changes_from_round_to_round(monkeypatch):
    """Guards against a side that always pays for the one before it."""
    order = []
    monkeypatch.setattr(timing, "step", lambda side, ids: order.append(side.policy.name) or 1.0)
    sides = [timing.Side(policy, None) for policy in choose(["window", "sink"], [4], 16)]
    timing.alternate(sides, timing.Tokens(model_of("llama"), []), 12, lambda _: None)
    assert {order[i] for i in range(0, len(order), 18)} == {"window", "sink"}


def test_quantiles_and_paired_ratios():
    assert [quantile([4.0, 1.0, 3.0, 2.0], share) for share in (0.25, 0.5, 0.51, 0.99)] == [1.0, 2.0, 3.0, 4.0]
    assert quantile([float(i) for i in range(1, 201)], 0.99) == 198.0
    above, below = [2.0, 6.0, 4.0, 9.0, 50.0], [1.0, 2.0, 2.0, 3.0, 10.0]
    value, low, high = paired_ratio(above, below)
    assert value == median([2.0, 3.0, 2.0, 3.0, 5.0]) == 3.0
    assert 2.0 <= low <= value <= high <= 5.0
    assert low < high
    assert (low, high) == paired_ratio(above, below)[1:], "the same numbers every time"
    assert paired_ratio([2.0, 4.0], [1.0, 1.0]) == (3.0, None, None)
    wide = paired_ratio([1.0, 9.0] * 4, [1.0] * 8)
    narrow = paired_ratio([1.0, 9.0, *[5.0] * 30], [1.0] * 32)
    assert wide[2] - wide[1] > narrow[2] - narrow[1]


def test_a_long_stream_goes_on_to_its_end_and_keeps_nothing(monkeypatch):
    """Guards "flat": the places are those that are printed, and no logits are computed between them."""
    model, head, fed = build("llama"), [], []
    model.lm_head.register_forward_hook(lambda _, args, out: head.append(out.shape))
    model.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    monkeypatch.setattr(timing, "PIECE", 300)
    loaded = type("Loaded", (), {"model": model, "sink_ids": [0]})()
    (policy,) = choose(["sink"], [2], 12)
    rows = timing.along_stream(loaded, policy, 12, 1000, points=5, tokens=10)
    assert [row.seen for row in rows] == [12, 254, 497, 739, 982]  # the last ends at 982 + 2 × 9 = 1000
    assert sum(shape[1] for shape in head) < sum(fed) / 2
    fillings = 5 * 12  # a new stream for each place
    assert sum(fed) == 1000 + fillings + 5 * 2 * (timing.BLOCK + 1)
    assert max(fed) <= 256
    assert all(row.tokens == 16 and row.rounds == 2 and row.resident_bytes > 10**7 for row in rows)


# --------------------------------------------------------------------------------------------------- the command


def test_rows_ratios_and_plot_come_with_every_budget(run, tmp_path, capsys):
    """Guards the JSON of DESIGN.md, "Commands": a row per configuration, ratios with intervals, and the tables."""
    code, out, err = measured(capsys, "--model", run, "--budgets", 24, 16, 24, "--tokens", 40,
                              "--json", tmp_path / "out.json")  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["command"], result["model"], result["dtype"]) == ("latency", str(run), "float32")
    assert result["threads"] == torch.get_num_threads()
    assert [(row["policy"], row["sinks"], row["window"], row["budget"], row["keys_seen"], row["tokens"])
            for row in result["rows"]] == [
        (name, sinks, None if name == "dense" else budget - sinks, budget, budget, 5 if name == "recompute" else 40)
        for budget in (16, 24)
        for name, sinks in (("dense", 0), ("recompute", 2), ("window", 0), ("sink", 2))
    ]  # fmt: skip
    for row in result["rows"]:
        assert 0 < row["ms_per_token"] <= row["ms_per_token_p99"]
        assert row["peak_bytes"] > 10**7
    assert [(row["budget"], row["ratio"], row["rounds"]) for row in result["ratios"]] == [
        (budget, ratio, 5) for budget in (16, 24) for ratio in ("recompute/sink", "sink/dense")
    ]
    assert all(row["low"] <= row["value"] <= row["high"] for row in result["ratios"])
    for words in ("recompute 2+14", "sink 2+22", "recompute/sink", "window 0+24", "peak"):
        assert words in out
    assert result["stream"] == []
    assert "tokens seen" not in out


def test_a_stream_and_a_plot_are_made(run, tmp_path, capsys):
    """Guards --stream-length and --plot: a row for every place of every stream, and a picture of both."""
    code, out, err = measured(capsys, "--model", run, "--budgets", 16, "--tokens", 8, "--stream-length", 300,
                              "--policies", "window", "sink", "--json", tmp_path / "out.json",
                              "--plot", tmp_path / "out.PNG")  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "out.json").read_text())
    places = [(row["label"], row["seen"]) for row in result["stream"]]
    assert len(set(places)) == len(places) == 2 * POINTS
    assert {("sink 2+14", 16), ("window 0+16", 300 - 9)} <= set(places)
    assert "tokens seen" in out
    assert "291" in out
    assert (tmp_path / "out.PNG").read_bytes().startswith(b"\x89PNG")


def test_positions_that_the_model_was_not_made_for_are_measured_and_said(run, capsys):
    code, out, err = measured(capsys, "--model", run, "--budgets", 140, "--tokens", 1, "--policies", "sink", "dense")
    assert code == 0, err
    assert "was made for 128 positions" in err
    assert "140" in out
    assert out.count("–") >= 1, "one block has no interval"
    code, out, err = measured(capsys, "--model", run, "--budgets", 128, "--tokens", 1, "--policies", "window")
    assert (code, err) == (0, "")
    assert "ratios" not in out


def test_a_shape_is_measured_without_weights(tmp_path, capsys):
    shape = tmp_path / "small.yaml"
    shape.write_text("model: {layers: 1, hidden: 16, heads: 2, kv_heads: 2, ffn: 16, positions: 64, vocabulary: 50}\n")
    code, _, err = measured(capsys, "--shape", shape, "--budgets", 16, "--tokens", 1, "--policies", "sink",
                              "--dtype", "bfloat16", "--json", tmp_path / "o.json")  # fmt: skip
    assert code == 0, err
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["model"] == "random weights, small"
    assert [(row["label"], row["keys_seen"]) for row in result["rows"]] == [("sink 4+12", 16)]
    assert latency.load_shape(shape, "float32", "cpu").model.config.hidden_size == 16


def test_threads_are_set_and_written_down(run, tmp_path, capsys):
    before = torch.get_num_threads()
    try:
        code, out, err = measured(capsys, "--model", run, "--budgets", 16, "--tokens", 1, "--policies", "dense",
                                  "--threads", before + 1, "--json", tmp_path / "o.json")  # fmt: skip
        assert code == 0, err
        assert f"{before + 1} threads" in " ".join(out.split())
        assert json.loads((tmp_path / "o.json").read_text())["threads"] == before + 1 == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--budgets", 4, 64, "--sinks", 4], "--budgets 4 does not hold --sinks 4"),
        (["--budgets", 2], "--budgets 2 does not hold --sinks 2"),  # the model's own
        (["--budgets", 1], "--budgets 1 does not hold"),
        (["--budgets", 0], "--budgets"),
        (["--sinks", 0], "--sinks"),
        (["--tokens", 0], "--tokens"),
        (["--policies", "window-paper"], "window-paper"),
        (["--policies", "dense", "--stream-length", 9999], "--stream-length is only for window and sink"),
        (["--stream-length", 500], "--stream-length 500 leaves no room .* make it at least 1384"),
        (["--threads", 0], "--threads"),
        (["--plot", "BAD/none/out.png"], "--plot .*none does not exist"),
        (["--plot", "BAD/out.pdf"], "out.pdf is not a .png"),
        (["--plot", "BAD/folder"], "is a folder"),
        (["--json", "BAD/none/out.json"], "--json .*none does not exist"),
        (["--model", "BAD/none"], "none is not a folder"),
        (["--model", "BAD/folder"], "no config.json"),
        (["--device", "gpu7"], "gpu7"),
        (["--dtype", "int3"], "int3"),
        (["--shape", "BAD/x.yaml", "--model", "y"], "not allowed with"),
        (["--budget", 4], "did you mean --budgets?"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(run, tmp_path, capsys, changes, message):
    (tmp_path / "folder").mkdir()
    base = {"--model": [run], "--budgets": [24], "--json": [tmp_path / "out.json"]}
    given = [str(part).replace("BAD", str(tmp_path)) for part in changes]
    for word in given:
        base.pop(word, None)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = measured(capsys, *given, *(part for key, values in base.items() for part in (key, *values)))
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert re.search(message, err), err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("hidden: 4", "has no shape of a model"),
        ("model: {layerz: 4}", "unexpected keyword argument 'layerz'"),
        ("model: {layers: two}", "has no shape of a model"),
        ("model: {heads: 5}", "not divisible by model.heads = 5"),
        ("model: [", "has no shape of a model"),
        ("- 4", "has no shape of a model"),
    ],
)
def test_a_shape_that_is_none_is_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "shape.yaml"
    if text is not None:
        path.write_text(text)
    code, _, err = measured(capsys, "--shape", path, "--budgets", 16)
    assert (code, err.count("\n")) == (2, 1), err
    assert message in err


def test_a_missing_plot_package_is_said_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    """Guards minutes of measuring that would end without the picture."""
    monkeypatch.delitem(sys.modules, "eval.report.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = measured(capsys, "--model", "no-such-model", "--plot", tmp_path / "x.png")
    assert (code, err.count("\n")) == (2, 1)
    assert "sinkmodel[plots]" in err


def test_help_is_quick_and_has_an_example(capsys):
    program = "import sys; from eval.cli import main; main(['latency', '--help'])"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0
    assert "example: sink-eval latency --model" in done.stdout
    assert " torch" not in done.stderr, "--help imports nothing heavy"


def test_a_model_with_a_narrower_window_of_its_own_is_refused():
    """Guards "keys seen": transformers would let a query see 8 keys although the row states 16."""
    model = build("mistral", sliding_window=8)
    loaded = type("Loaded", (), {"model": model, "sink_ids": [], "positions": 64, "name": "m"})()
    with pytest.raises(UserError, match="'mistral' has its own window of 8"):
        latency._check_model(loaded, 16)


def test_loading_is_shared_with_ppl(run):
    """Guards that --model means the same in both: the model that ppl loads is the one that is timed."""
    assert (
        load_model(str(run)).sink_ids
        == latency.load(type("Options", (), {"model": str(run), "dtype": None, "device": None})()).sink_ids
    )
