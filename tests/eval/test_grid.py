"""Guards `sink-eval grid`: the same targets for every cell, runs as an axis, the paper's numbers in their cells."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from transformers import GPTNeoXConfig, LlamaConfig

from eval.cli import main
from eval.measures.statistics import block_stderr
from eval.measures.verdict import paper
from eval.measures.verdict.grid import over_runs
from eval.measures.verdict.training import shape_of
from sinkmodel.checkpoint import PREFIX
from sinkmodel.loading import LoadedModel, encode, load_model
from sinkmodel.models import transformers_config
from sinkmodel.shapes import ModelShape
from sinkmodel.sinks import SinkConfig
from tests import tiny
from tests.reference import streaming_nll as reference

BUDGETS = (12, 20)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of each kind, by name; the second has noise on its head."""
    folders = {}
    for kind in ("none", "token", "zero"):
        for number in (1, 2):
            folder = tmp_path_factory.mktemp(f"{kind}-{number}-")
            path = tiny.checkpoint(folder, "llama", SinkConfig(kind))
            content = torch.load(path, weights_only=True)
            head = content["state_dict"][PREFIX + "lm_head.weight"]
            head += 0.1 * number * torch.randn(head.shape, generator=torch.Generator().manual_seed(number))
            torch.save(content, path)
            folders[f"{kind}{number}"] = folder
    return folders


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": tiny.words(15, seed=i)}) + "\n" for i in (1, 2)))
    return path


def grid(capsys, *arguments) -> tuple[int, str, str]:
    return main(["grid", *map(str, arguments)]), *capsys.readouterr()


def test_every_cell_is_the_mean_over_runs_on_the_same_targets(runs, texts, tmp_path, capsys):
    """Token by token: after k sinks, and after the largest budget, whatever the budget of the cell is."""
    arguments = ["--models", f"vanilla={runs['none1']},{runs['none2']}", f"sink={runs['token1']},{runs['token2']}",
                 f"off-by-one={runs['zero1']}", "--sinks", 0, 1, "--budgets", *BUDGETS, "--text", texts]  # fmt: skip
    code, out, err = grid(capsys, *arguments, "--json", tmp_path / "o.json")
    assert code == 0, err
    content = json.loads((tmp_path / "o.json").read_text())
    rows = {(row["model"], row["budget"], row["sinks"]): row for row in content["rows"]}
    names = {"vanilla": ("none1", "none2"), "sink": ("token1", "token2"), "off-by-one": ("zero1",)}
    assert set(rows) == {(name, budget, count) for name in names for budget in BUDGETS for count in (0, 1)}
    assert len({row["nll_after_overflow"] for row in rows.values()}) == len(rows), "else what follows proves little"
    documents = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    for (name, budget, count), row in rows.items():
        means, errors = [], []
        for run in names[name]:
            loaded = load_model(str(runs[run]))
            own = len(loaded.sink_ids)
            late = [
                reference(loaded.model, loaded.sink_ids + encode(loaded, text), budget, count)[own:][BUDGETS[-1] :]
                for text in documents
            ]
            means.append(torch.cat(late).mean().item())
            errors.append(block_stderr(late, budget))
        assert [one["nll"] for one in row["runs"]] == pytest.approx(means, abs=1e-5)
        assert [one["stderr"] for one in row["runs"]] == pytest.approx(errors, abs=1e-5)
        assert [one["run"] for one in row["runs"]] == [str(runs[run]) for run in names[name]]
        assert row["nll_after_overflow"] == pytest.approx(sum(means) / len(means), abs=1e-5)
        assert row["ppl_after_overflow"] == pytest.approx(math.exp(row["nll_after_overflow"]))
        assert row["tokens_after_overflow"] == sum(map(len, late))
        assert (row["ppl_low"] is None) == (name == "off-by-one")
        if row["ppl_low"] is not None:
            assert row["ppl_low"] < row["ppl_after_overflow"] < row["ppl_high"]
            assert row["ppl_high"] == pytest.approx(math.exp(row["nll_high"]))
    assert {row["paper_ppl"] for row in rows.values()} == {None}
    assert "paper" not in out


def test_the_papers_numbers_stand_where_model_and_cache_are_the_papers(runs, texts, tmp_path, capsys, monkeypatch):
    """Risk: 27.87, of 160M parameters at C = 1024, beside a toy at C = 12."""
    shape = tiny.SHAPES["llama"]
    of_tiny = ("llama", shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.ffn, shape.positions)
    monkeypatch.setitem(paper.PAPER, (of_tiny, "token ×1", 20), {0: 1235.0, 1: 18.01})
    arguments = ["--models", f"a={runs['token1']}", f"b={runs['none1']}", "--sinks", 0, 1, 4, "--budgets", *BUDGETS]
    code, out, err = grid(capsys, *arguments, "--text", texts, "--json", tmp_path / "o.json")
    assert code == 0, err
    papers = {(row["model"], row["budget"], row["sinks"]): row["paper_ppl"]
            for row in json.loads((tmp_path / "o.json").read_text())["rows"]}  # fmt: skip
    assert {key: ppl for key, ppl in papers.items() if ppl} == {("a", 20, 0): 1235.0, ("a", 20, 1): 18.01}
    lines = [line.split() for line in out.splitlines()]
    (line,) = (line for line in lines if line[:1] == ["paper"])
    assert line == ["paper", "token", "×1", "1", "20", "1,235.00", "18.01", "–"]
    assert lines[lines.index(line) - 1][:5] == ["a", "token", "×1", "1", "20"], "below the line of its budget"
    assert "another text (PG-19)" in " ".join(out.split())


def test_the_papers_models_are_known_by_their_configs():
    """Configs as their makers publish them; one number changed is another model."""

    def of_paper(config, kind, budget, sinks):
        loaded = LoadedModel(SimpleNamespace(config=config), None, [], "")
        return paper.of_paper(shape_of(loaded.model.config), kind, budget, sinks)

    def sized(config, hidden, layers, heads, ffn, **others):
        sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
        return config(**sizes, intermediate_size=ffn, **others)

    small, large = sized(GPTNeoXConfig, 768, 12, 12, 3072), sized(GPTNeoXConfig, 5120, 36, 40, 20480)
    llama = sized(LlamaConfig, 4096, 32, 32, 11008, max_position_embeddings=4096)
    ours = {"zero": transformers_config(ModelShape(), 50304, SinkConfig("zero"))}  # of a model type of its own
    kinds = ("none", "zero", "token ×1", "token ×2", "logit")
    assert [of_paper(ours.get(kind, small), kind, 1024, 0) for kind in kinds] == [
        *(27.87, 29214.0, 1235.0, 1262.0),
        None,
    ]
    assert [of_paper(large, "none", 2048, 8), of_paper(llama, "none", 4096, 2), of_paper(llama, "none", 512, 4)] == [
        *(12.02, 10.51, 9.73)
    ]
    assert [of_paper(small, "none", 256, 0), of_paper(small, "none", 1024, 3), of_paper(llama, "none", 512, 0)] == [
        None
    ] * 3
    for changed in (sized(GPTNeoXConfig, 768, 6, 12, 3072), sized(LlamaConfig, 768, 12, 12, 3072)):
        assert of_paper(changed, "none", 1024, 0) is None
    yi_6b = sized(LlamaConfig, 4096, 32, 32, 11008, num_key_value_heads=4, max_position_embeddings=4096)
    wider = sized(LlamaConfig, 4096, 32, 32, 14336, max_position_embeddings=4096)
    assert [of_paper(other, "none", 4096, 0) for other in (llama, yi_6b, wider)] == [3359.95, None, None]


def test_runs_that_are_no_seeds_of_one_model_and_text_that_was_trained_on_are_said(runs, texts, tmp_path, capsys):
    """Guards a grid of unlike runs, and one on its models' own training text."""
    from recipes.data.preparation import prepare
    from recipes.data.settings import PrepareConfig

    (tmp_path / "train.jsonl").write_text(texts.read_text().splitlines()[0])
    (tmp_path / "tokenizer.json").write_text(tiny.tokenizer().definition)
    data = str(tmp_path / "data")
    manifest = prepare(
        PrepareConfig(data, input=str(tmp_path / "train.jsonl"), validation_fraction=0.0,
                      tokenizer=str(tmp_path / "tokenizer.json"), workers=1)
    )  # fmt: skip
    provenance = {
        "config": {"seed": 3, "data": {"path": data}},
        "data": {"fingerprint": manifest["fingerprint"]},
    }
    for name, shape in (("a", "llama"), ("b", "gpt_neox")):
        path = tiny.checkpoint(tmp_path / name, shape, SinkConfig("none"))
        content = torch.load(path, weights_only=True)
        content["recipe"]["provenance"] |= provenance
        torch.save(content, path)
    a, b = tmp_path / "a", tmp_path / "b"
    code, _, err = grid(capsys, "--models", f"m={a},{b}", "--sinks", 1, "--budgets", 12, "--text", texts,
                        "--json", tmp_path / "o.json")  # fmt: skip
    assert code == 0
    warnings = json.loads((tmp_path / "o.json").read_text())["warnings"]
    assert warnings == [
        f"{a} and {b} differ by more than their seeds: model type llama and gpt_neox",
        f"{a} and {b} have the same seed, 3: they do not represent other seeds",
        *(f"{run} was trained on {texts}: 1 of 2 documents begin like training documents; give held-out text"
          for run in (a, b)),
    ]  # fmt: skip
    assert all(f"warning: {warning}" in err for warning in warnings)


def test_the_interval_over_runs_is_students():
    """Three runs: the mean ± t(2 degrees) · s / √3, here s = 1; scipy's own says the same."""
    assert over_runs([5.0]) == (5.0, None, None)
    center, low, high = over_runs([1.0, 2.0, 3.0])
    assert (center, low, high) == pytest.approx((2.0, 2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    values = [4.0, 4.5, 3.9, 4.4]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert over_runs(values, 0.9)[1:] == pytest.approx((expected.low, expected.high))


def test_the_same_call_gives_the_same_bytes(runs, texts, tmp_path, capsys):
    contents = []
    for _ in range(2):
        grid(capsys, "--models", runs["none1"], "--sinks", 1, "--budgets", 12, "--text", texts,
             "--json", tmp_path / "o.json")  # fmt: skip
        contents.append(re.sub(r'"date": ".*"', "", (tmp_path / "o.json").read_text()))
    assert contents[0] == contents[1]
    (row,) = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert row["model"] == str(runs["none1"]), "a run alone is its own name"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--models": ["a={none1},{none1}"]}, "has a run twice, which is not another seed"),
        ({"--models": ["a={none1},{none1}/"]}, "has a run twice, which is not another seed"),
        ({"--models": ["{none1}", "{none1}/"]}, "--models has .*/ twice; give all its runs at once"),
        ({"--models": ["a={none1},"]}, "is not NAME=RUN,RUN"),
        ({"--models": ["={none1}"]}, "is not NAME=RUN,RUN"),
        ({"--models": ["a={none1}", "a={none2}"]}, "--models has a twice"),
        ({"--models": ["a={none1},{token1}"]}, "--models a mixes sinks: .* has none, .* has token ×1"),
        ({"--models": ["a=nowhere"]}, "nowhere is not a folder"),
        ({"--sinks": [0, 12]}, "--budgets 12 does not hold --sinks 12"),
        ({"--budgets": [12, 300]}, "is shorter than the budget: .* --budgets is 300"),
        ({"--tokens": [21]}, "--tokens 21 does not overflow --budgets 20"),
        ({"--text": ["none.txt"]}, "none.txt does not exist"),
        ({"--json": ["none/o.json"]}, "none does not exist"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_scored(runs, texts, tmp_path, capsys, changes, message):
    given = {"--models": ["a={none1}"], "--text": [texts], "--budgets": BUDGETS, "--sinks": [1]}
    given |= {"--json": [tmp_path / "o.json"]} | changes
    given["--models"] = [name.format(**runs) for name in given["--models"]]
    code, out, err = grid(capsys, *(part for key, values in given.items() for part in (key, *values)))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    assert re.search(message, err), err
    assert not (tmp_path / "o.json").exists()


def test_a_text_that_nothing_overflows_and_other_tokenizers_are_refused(runs, tmp_path, capsys, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_text(tiny.words(20))
    count = len(encode(load_model(str(runs["none1"])), text.read_text()))
    base = ["--text", text, "--sinks", 1, "--models", runs["none1"]]
    code, _, err = grid(capsys, *base, "--budgets", count - 1)
    assert (code, err.count("\n")) == (2, 1)
    assert f"no document overflows --budgets {count - 1}; give one of {count + 1} tokens or more" in err
    assert grid(capsys, *base, "--budgets", count - 2)[0] == 0
    text.write_text(tiny.words(200))
    code, _, err = grid(capsys, *base, "--budgets", 64, 129)
    assert (code, err.count("\n")) == (2, 1)
    assert "sink 1+128 takes 129 positions" in err
    other = tiny.tokenizer(290)
    monkeypatch.setattr(tiny, "tokenizer", lambda: other)
    tiny.checkpoint(tmp_path / "other", "llama", SinkConfig("none"))
    code, _, err = grid(capsys, *base, tmp_path / "other", "--budgets", 12)
    assert (code, err.count("\n")) == (2, 1)
    assert "have different tokenizers (300 and 290 text tokens)" in err
