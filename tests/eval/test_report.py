"""Guards: the report draws what was measured, and refuses what is no measurement."""

from __future__ import annotations

import csv
import json

import pytest

from eval.cli import main
from eval.report.report import labels


@pytest.fixture
def measured(tmp_path):
    run = tmp_path / "sink"
    run.mkdir()
    (run / "metrics.csv").write_text(
        "step,tokens,loss,ppl,twin_loss,lr,grad_norm,sink_share,tokens_per_second,mfu,val_loss,val_ppl\n"
        "5,500,6.0,403,5.9,1e-3,1,0.1,100,0.1,,\n10,1000,5.0,148,4.9,1e-3,1,0.1,100,0.1,,\n10,1000,,,,,,,,,5.5,244\n5,5"
    )
    rows = [{"policy": "sink", "sinks": 1, "window": 7, "by_position": [[1, 8, 3.0], [9, 16, 3.5]]}]
    rows.append({"policy": "dense", "sinks": 0, "window": None, "by_position": [[1, 8, 2.9], [9, 16, 3.1]]})
    (tmp_path / "ppl.json").write_text(
        json.dumps({"command": "ppl", "model": "models/sink", "budget": 8, "rows": rows})
    )
    return tmp_path


def test_picture_and_numbers_are_made(measured):
    options = ["--runs", measured / "sink", "--ppl", measured / "ppl.json", "--output", measured / "report"]
    assert main(["report", *map(str, options)]) == 0
    assert (measured / "report" / "report.png").read_bytes().startswith(b"\x89PNG")
    losses = list(csv.DictReader((measured / "report" / "loss.csv").open()))
    assert [(row["run"], row["tokens"], row["twin_loss"], row["val_loss"]) for row in losses] == [
        ("sink", "500", "5.9", ""),
        ("sink", "1000", "4.9", ""),
        ("sink", "1000", "", "5.5"),
    ]
    places = list(csv.DictReader((measured / "report" / "positions.csv").open()))
    assert [(row["policy"], row["first"], row["nll"]) for row in places] == [
        ("sink", "1", "3.0"),
        ("sink", "9", "3.5"),
        ("dense", "1", "2.9"),
        ("dense", "9", "3.1"),
    ]


def test_every_policy_has_a_line_with_a_name_of_its_own():
    """Guards more rows than colours, and S+W meaning two things in one picture."""
    from eval.report.plots import draw_positions, plt

    rows = [{"policy": "sink", "sinks": s, "window": 12 - s, "by_position": [[1, 8, 3.0]]} for s in range(1, 9)]
    rows.append(
        {"policy": "recompute", "label": "recompute 1+11", "sinks": 1, "window": 11, "by_position": [[1, 8, 3]]}
    )
    rows.append({"policy": "dense", "sinks": 0, "window": None, "by_position": [[1, 8, 2.9]]})
    figure, axis = plt.subplots()
    draw_positions(axis, {"model": "m", "budget": 12, "rows": rows})
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    plt.close(figure)
    assert names == [*(f"{s}+{12 - s}" for s in range(1, 9)), "recompute 1+11", "dense"]


def test_runs_of_one_name_keep_their_curves(tmp_path):
    assert labels([tmp_path / "a" / "sink", tmp_path / "b" / "none"]) == ["sink", "none"]
    assert len(set(labels([tmp_path / "a" / "sink", tmp_path / "b" / "sink"]))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runs", "{}/none"], "has no metrics.csv"),
        (["--ppl", "{}/sink/metrics.csv"], "is not valid JSON"),
        (["--ppl", "{}/other.json"], "is not a result of sink-eval ppl"),
        (["--ppl", "{}/empty.json"], "is not a result of sink-eval ppl"),
        ([], "nothing to draw"),
        (["--run", "x"], "did you mean --runs?"),
    ],
)
def test_bad_input_is_one_line(measured, capsys, options, message):
    (measured / "other.json").write_text("[]")
    (measured / "empty.json").write_text('{"command": "ppl"}')
    argv = [option.format(measured) for option in options]
    assert main(["report", *argv, "--output", str(measured / "report")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (measured / "report").exists()
