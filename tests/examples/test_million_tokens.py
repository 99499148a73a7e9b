"""Guards: the example still runs, scores what the library scores, and shows the memory that a stream really takes."""

from __future__ import annotations

import csv
import importlib.util
import math
from pathlib import Path

import pytest

from sinkmodel.export import export
from sinkmodel.loading import encode, load_model
from sinkmodel.scoring import streaming_nll
from tests.tiny import checkpoint, words

FILE = Path(__file__).resolve().parents[2] / "examples" / "million_tokens.py"
spec = importlib.util.spec_from_file_location("million_tokens", FILE)
million_tokens = importlib.util.module_from_spec(spec)
spec.loader.exec_module(million_tokens)

TOKENS, BUDGET = 3000, 32


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("million")
    return export(checkpoint(folder), folder / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(words(600))  # fewer tokens than are asked for: it is read again
    return path


def test_the_figures_numbers_are_those_of_the_library(model, text, tmp_path, capsys):
    words_of = ["--model", str(model), "--text", str(text), "--tokens", str(TOKENS), "--budget", str(BUDGET)]
    assert million_tokens.main([*words_of, "--output", str(tmp_path / "million.png")]) == 0
    rows = [
        {key: float(value) for key, value in row.items()} for row in csv.DictReader((tmp_path / "million.csv").open())
    ]
    loaded = load_model(str(model))
    once = encode(loaded, text.read_text())
    assert len(once) < TOKENS, "or nothing was read twice"
    ids = (once * (TOKENS // len(once) + 1))[:TOKENS]
    (nll,) = streaming_nll(loaded.model, [loaded.sink_ids + ids], BUDGET, 1)
    assert [row["tokens"] for row in rows] == list(range(15, TOKENS + 1, 15))
    for row in (rows[0], rows[99], rows[-1]):
        assert row["ppl"] == pytest.approx(math.exp(nll[: int(row["tokens"])].mean().item()), rel=1e-4)
    assert rows[-1]["ppl_latest"] == pytest.approx(math.exp(nll[-15:].mean().item()), rel=1e-4)
    assert (tmp_path / "million.png").read_bytes().startswith(b"\x89PNG")
    assert "3,000 tokens in " in capsys.readouterr().out


def test_a_key_takes_what_its_keys_and_values_take(model):
    from sinkmodel.streaming import Stream

    loaded = load_model(str(model))
    stream = Stream(loaded.model, loaded.tokenizer, BUDGET)
    stream.feed([5, 6, 7])
    layers, hidden, fp32 = 2, 32, 4
    assert million_tokens.bytes_of_a_key(stream) == 2 * layers * hidden * fp32


@pytest.mark.parametrize(
    ("words_of", "message"),
    [
        (["--output", "million.doc"], "the name of a figure must end in one of"),
        (["--output", "no/such/million.png"], "the folder does not exist"),
        (["--output", "million.png", "--text", "none.txt"], "none.txt does not exist"),
    ],
)
def test_a_mistake_is_known_before_a_model_is_loaded(words_of, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert million_tokens.main(["--model", "no-such-model", *words_of]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
