"""Guards: the table of an evaluation holds every result once, in order, whoever writes it last."""

from __future__ import annotations

import csv

import pytest

from sinkmodel.errors import UserError
from sinkmodel.results.files import write_result
from sinkmodel.results.perplexity import PerplexityResult, PerplexityRow
from slurm import collect


def result(folder, step: int) -> None:
    losses = {"tokens": None, "nll": step / 7, "nll_after_overflow": None, "stderr_after_overflow": None}
    row = PerplexityRow(policy="sink", sinks=1, window=None, **losses, by_position=[])
    write_result(folder / f"step{step}.json", PerplexityResult(model="m", budget=8, rows=[row]))


def steps(folder) -> list[int]:
    return [int(row["step"]) for row in csv.DictReader((folder / "table.csv").open())]


def test_steps_stand_in_the_order_of_numbers_with_every_digit(tmp_path):
    for step in (1000, 8, 64):
        result(tmp_path, step)
    (tmp_path / "stepping.json").write_text("not ours")
    assert collect.collect(tmp_path) == 3
    assert steps(tmp_path) == [8, 64, 1000]
    assert [float(row["nll"]) for row in csv.DictReader((tmp_path / "table.csv").open())] == [8 / 7, 64 / 7, 1000 / 7]
    assert (tmp_path / "table.md").read_text().splitlines()[2] == "| 8 | sink | 1 |  |  |  |  | 1.1429 |  |  |  |  |"


def test_a_result_that_comes_while_the_table_is_written_is_in_it(tmp_path, monkeypatch):
    """Risk: its own task has written the table before, and ours, which does not know of it, comes last."""
    result(tmp_path, 5)
    markdown = collect.markdown

    def and_another_comes(rows):
        if len(rows) < 3:
            result(tmp_path, 10 * len(rows))
        return markdown(rows)

    monkeypatch.setattr(collect, "markdown", and_another_comes)
    assert collect.collect(tmp_path) == 3
    assert steps(tmp_path) == [5, 10, 20]
    assert (tmp_path / "table.md").read_text().count("\n") == 5


def test_a_folder_without_results_is_said(tmp_path):
    with pytest.raises(UserError, match=r"holds no step\*\.json"):
        collect.collect(tmp_path)


def test_a_result_of_another_command_is_one_line(tmp_path):
    """Risk: a traceback in the log of a job, or a table without its numbers."""
    (tmp_path / "step8.json").write_text('{"command": "sinks"}')
    with pytest.raises(UserError, match="is not what sink-eval sinks --json writes"):
        collect.collect(tmp_path)
    assert not (tmp_path / "table.csv").exists()
