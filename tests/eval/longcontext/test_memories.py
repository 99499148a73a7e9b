"""Guards the command with the real `sinkmodel.memories`: how their prompts begin, end, fork, and what they refuse."""

from __future__ import annotations

import json
import re

import pytest

from eval.cli import main
from eval.measures.longcontext import measure as module
from sinkmodel.memories import BUDGETED
from tests.eval.namm import ROWS, check_rows, write_artefact

ARGUMENTS = ["--length", "450", "--samples", "1", "--distractors", "1", "--answer-tokens", "2"]
SMALL, LARGE = 64, 500


@pytest.fixture(autouse=True)
def no_floor(monkeypatch):
    monkeypatch.setattr(module, "FLOOR_SCORE", 0.0)


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_a_memory_that_forgets_nothing_is_dense_and_one_that_forgets_is_not(run, book, tmp_path, capsys, place):
    """Risk: a wrong end of the prompt, positions, or a fork that shares keys. All memories, in one command."""
    words = ["--tasks", "key_value", "--text", str(book), "--budgets", str(SMALL), str(LARGE), "--question", place]
    code = main(["longcontext", "--model", str(run), *words, *ARGUMENTS, "--json", str(tmp_path / "o.json")])
    assert code == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    labels = ["dense", *(f"{name} {budget}" for name in BUDGETED for budget in (SMALL, LARGE))]
    assert [row["label"] for row in rows] == labels
    of_dense = rows[0]
    assert of_dense["questions"] == 4
    for row in rows:
        if row["budget"] == LARGE:
            assert row["by_context"]["nll"] == pytest.approx(of_dense["by_context"]["nll"], abs=1e-4)
            assert row["bytes_kept"] == of_dense["bytes_kept"]
        elif row["budget"] == SMALL:
            assert row["by_context"]["nll"] != pytest.approx(of_dense["by_context"]["nll"], abs=1e-3)
            assert row["bytes_kept"] == SMALL * 2 * 2 * 2 * 8 * 4, "layers, heads, K and V, size, fp32"


def test_the_options_of_a_memory_reach_it(run, book, tmp_path, capsys):
    """Risk: an option that is accepted and changes nothing."""
    words = ["--model", str(run), "--tasks", "key_value", "--text", str(book), "--budgets", str(SMALL)]

    def nll(memory, *more):
        arguments = [*words, *ARGUMENTS, "--memories", memory, *more, "--json", str(tmp_path / "o.json")]
        assert main(["longcontext", *arguments]) == 0, capsys.readouterr().err
        content = json.loads((tmp_path / "o.json").read_text())
        assert [content[option[2:]] for option in more[::2]] == [int(x) if x.isdigit() else x for x in more[1::2]]
        return content["rows"][1]["nll"]

    for memory, *changes in (("tova", "--sinks", "40", "--window", "20"), ("gemfilter", "--layer", "0")):
        assert nll(memory, *changes) != pytest.approx(nll(memory), abs=1e-4), memory
    plain, cached = nll("snapkv"), nll("snapkv", "--positions", "cache")
    assert plain != pytest.approx(cached, abs=1e-5)


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_namm_comes_with_controls_of_its_size(run, book, tmp_path, capsys, place):
    """Risk: sizes of other prompts, since the NAMM reads all of a cell before its controls do; inside has four."""
    artefact = write_artefact(tmp_path / "namm", interval=48)
    words = ["--tasks", "key_value", "--text", book, "--memories", "namm", "--artefact", artefact, "--question", place]
    arguments = ["longcontext", "--model", run, *words, *ARGUMENTS, "--json", tmp_path / "o.json"]
    code = main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert code == 0, err
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    check_rows(rows, 400)
    assert len({row["nll"] for row in rows}) == 7
    assert all(name in out for name in ROWS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memories", "tova", "snapkv"], "snapkv at --budgets 8: a budget of 8 does not hold .* a window of 32"),
        (["--memories", "expected-attention", "--sinks", "9"], "expected-attention at --budgets 8: .* 9 sinks"),
        (["--window", "65"], "snapkv at --budgets 8: a budget of 8 does not hold 0 sinks and a window of 65"),
        (["--positions", "fresh"], "--positions: invalid choice"),
    ],
)
def test_a_budget_that_is_too_small_for_a_memory_is_one_line_before_a_model_is_loaded(tmp_path, capsys, words, message):
    words = ["--tasks", "niah_single_1", "--budgets", "8", "64", *words]
    code = main(["longcontext", "--model", "no-such-model", *words, "--json", str(tmp_path / "o.json")])
    _, err = capsys.readouterr()
    assert (code, err.count("\n")) == (2, 1), err
    assert re.search(message, err)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_the_model_has_not_is_one_line(run, tmp_path, capsys):
    words = ["--tasks", "niah_single_1", "--memories", "gemfilter", "--layer", "9"]
    code = main(["longcontext", "--model", str(run), *words, "--json", str(tmp_path / "o.json")])
    _, err = capsys.readouterr()
    assert (code, err.count("\n")) == (2, 1), err
    assert "GemFilter chooses in layer 9 and the model has layers 0 to 1" in err
    assert not list(tmp_path.iterdir())
