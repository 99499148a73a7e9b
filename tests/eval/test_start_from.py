"""Every question of sink-eval, and a stream, on models that got their sink after they were trained."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from eval.cli import main
from eval.measures.verdict.training import not_seeds, not_twins, training_of
from sinkmodel import StreamingCache
from sinkmodel.export.row import export_row
from sinkmodel.loading import load_base, load_model
from sinkmodel.scoring import streaming_nll
from sinkmodel.streaming.command import main as stream_command
from tests import bases, tiny
from tests.recipes.test_start_from import train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return bases.save_base(tmp_path_factory.mktemp("base") / "qwen3", "qwen3", num_key_value_heads=2, head_dim=8)


@pytest.fixture(scope="module")
def rows(base, tmp_path_factory):
    """Two seeds of a trained row on one base."""
    folder = tmp_path_factory.mktemp("rows")
    data = tiny.prepared(folder / "data")
    more = {"training__parts": "sink", "model__sink_row": "random"}
    return [train(data, base, folder / f"row{seed}", seed=seed, **more) for seed in (1, 2)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": tiny.words(60, seed=i)}) + "\n" for i in range(6)))
    return path


def result(tmp_path, *words: object) -> dict:
    file = tmp_path / "result.json"
    assert main([*map(str, words), "--json", str(file)]) in (0, 1)
    return json.loads(file.read_text())


def test_verify_takes_the_base_as_the_twin_of_every_row(base, rows, texts, tmp_path, capsys):
    """Risk: a row is compared with another model than the one that it was trained on, and nobody is warned."""
    words = ["verify", "--sink", *rows, "--text", texts, "--budget", "16", "--vanilla"]
    content = result(tmp_path, *words, base)
    assert [pair["vanilla"] for pair in content["pairs"]] == [str(base)] * 2
    assert content["verdict"]["runs"] == 2
    assert "not twins" not in capsys.readouterr().err
    other = bases.save_base(tmp_path / "other", "qwen3", num_key_value_heads=2, head_dim=8, initializer_range=0.2)
    result(tmp_path, *words, other)
    assert f"not twins: the first has a trained sink on another base, {base}" in capsys.readouterr().err


def record(name: object, dtype: str = "float32") -> dict:
    return training_of(load_model(str(name), dtype))


def test_the_base_is_no_twin_of_a_run_that_trained_all(base, rows, tmp_path):
    """Risk: what a run gained by further training passes for the work of its sink."""
    run = train(tiny.prepared(tmp_path / "data"), base, tmp_path / "all", schedule__steps=2, checkpoints__every=2)
    assert not_twins(record(run), record(base)) == ["the second is the base that the first was trained further from"]
    both = {"row": record(rows[0]), "all": record(run)}
    assert "other parts trained" in not_seeds(both)[0]


def test_another_base_is_named_in_half_precision_as_well(base, rows, tmp_path, monkeypatch):
    """Risk: fingerprints are of fp32, so that in bf16 any model passes for the base."""
    other = shutil.copytree(base, tmp_path / "other")
    row = record(rows[0], "bfloat16")
    assert not_twins(row, record(base, "bfloat16")) == []
    monkeypatch.chdir(base.parent)
    assert not_twins(row, record(base.name, "bfloat16")) == []
    assert not_twins(row, record(other, "bfloat16")) == [
        f"as --dtype is not float32, it is not checked that the second is {base}, the base"
    ]


@pytest.mark.parametrize(
    "words",
    [
        ("ppl", "--model", "{}", "--text", "{text}", "--budget", "16", "--policies", "dense", "window", "sink"),
        ("sinks", "--model", "{}", "--text", "{text}", "--length", "32", "--sequences", "2"),
        ("streameval", "--model", "{}", "--budgets", "32", "--samples", "1", "--queries", "2"),
        ("grid", "--models", "a={}", "--text", "{text}", "--budgets", "16", "--sinks", "0", "1"),
        ("zeroshot", "--model", "{}", "--data", "{tasks}"),
    ],
)
def test_every_question_is_asked_of_a_row(rows, texts, tmp_path, words):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    question = {"context": "one two", "continuation": " three"}
    (tasks / "mine.jsonl").write_text(json.dumps(question) + "\n")
    content = result(tmp_path, *(word.format(rows[0], text=texts, tasks=tasks) for word in words))
    assert content["rows"]


def test_a_report_tells_what_a_run_started_from(base, rows, tmp_path):
    """Risk: runs on several bases look alike."""
    assert main(["report", "--run", str(rows[0]), "--output", str(tmp_path / "report")]) == 0
    fingerprint = load_base(str(base))[1].fingerprint
    assert f"| {base.name} {fingerprint[:16]}, sink |" in (tmp_path / "report" / "report.md").read_text()


def test_a_stream_keeps_the_sink_and_generates_none(rows):
    loaded = load_model(str(rows[0]))
    cache = StreamingCache(loaded.model.config, budget=16)
    prompt = loaded.tokenizer(tiny.words(10), return_tensors="pt")
    assert prompt.input_ids[0, 0] == 300
    ids = loaded.model.generate(
        **prompt, past_key_values=cache, max_new_tokens=60, do_sample=True, eos_token_id=None
    )  # fmt: skip
    assert (ids[0] == 300).sum() == 1
    assert cache.sinks == 1


def test_sink_stream_scores_and_continues_a_text_behind_the_row(base, rows, tmp_path, monkeypatch, capsys):
    """Risk: the command reads the base without its row, or with the row where the first token of the text is kept."""
    text = tiny.words(60)
    row = export_row(rows[0], tmp_path / "row.safetensors")
    (tmp_path / "piped").write_text(text)

    def stream(*words: object) -> str:
        with (tmp_path / "piped").open() as file:
            monkeypatch.setattr(sys, "stdin", file)
            assert stream_command(["--budget", "16", "--model", *map(str, words)]) == 0
        return capsys.readouterr().out

    for name in (rows[0], row, base):
        loaded = load_model(str(name))
        ids = loaded.tokenizer(text, add_special_tokens=False).input_ids
        (nll,) = streaming_nll(loaded.model, [loaded.sink_ids + ids], 16, max(1, len(loaded.sink_ids)))
        tokens, mean = stream(name, "--score").split()[1:4:2]
        assert int(tokens) == len(ids) - 1
        assert float(mean) == pytest.approx(nll[len(loaded.sink_ids) :].mean().item(), abs=1e-5)
        assert "sink" not in stream(name, "--max-tokens", "20", "--temperature", "1")
    assert stream(rows[0], "--score") == stream(row, "--score") != stream(base, "--score")


def test_a_base_that_is_gone_is_one_line(base, rows, texts, tmp_path, capsys):
    hidden = shutil.move(base, tmp_path / "hidden")
    try:
        assert main(["ppl", "--model", str(rows[0]), "--text", str(texts), "--budget", "16"]) == 2
    finally:
        shutil.move(hidden, base)
    assert "holds only what was trained on top of" in capsys.readouterr().err
