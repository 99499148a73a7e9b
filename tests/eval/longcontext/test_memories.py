"""Guards the command with the real `sinkmodel.memories`: how their prompts begin, end, fork, and what they refuse."""

from __future__ import annotations

import json
import re

import pytest

from eval.cli import main
from eval.measures.longcontext import measure as module
from sinkmodel.memories import BUDGETED

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


def test_a_budget_that_is_too_small_for_a_memory_is_one_line(run, tmp_path, capsys):
    words = ["--tasks", "niah_single_1", "--budgets", "8", "64", "--memories", "tova", "snapkv"]
    code = main(["longcontext", "--model", str(run), *words, "--json", str(tmp_path / "o.json")])
    _, err = capsys.readouterr()
    assert (code, err.count("\n")) == (2, 1), err
    assert re.search("snapkv at --budgets 8: a budget of 8 does not hold .* a window of 32", err)
    assert not list(tmp_path.iterdir())
