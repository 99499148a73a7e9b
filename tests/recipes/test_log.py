"""Guards: `sink-log` brings what was measured, and the curves that it lacks, to a run's page; bad input is one line."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recipes.log import main as log
from tests import results
from tests.recipes.logged import expected_points, logged_steps, points, records_of
from tests.recipes.runs import train


@pytest.fixture
def measured(tmp_path):
    """Results with and without a verdict, maps and a report, as sink-eval writes them."""
    files = results.write(tmp_path, {"verify": results.verify(), "ppl": results.ppl()})
    for name in ("maps", "report"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 4), (0, 32, 77)).save(tmp_path / "maps" / "maps.png")
    (tmp_path / "report" / "report.html").write_text("<h1>equivalent</h1>")
    return ["--results", *files, "--maps", str(tmp_path / "maps")]


@pytest.mark.slow
def test_what_was_measured_goes_to_the_runs_own_page_and_its_lacking_curves_with_it(data, tmp_path, measured, capsys):
    """The run was trained without either logger."""
    run = train(data, tmp_path / "run")
    words = ["--run", str(run), *measured, "--report", str(tmp_path / "report"), "--checkpoints"]
    assert log([*words, "--to", "wandb", "tensorboard"]) == 0
    assert logged_steps(run) == [*range(5, 41, 5), 41]
    shown = {tuple(item.nested_key): json.loads(item.value_json) for item in records_of(run, "history")[-1].item}
    assert shown["maps/maps", "_type"] == "image-file"
    assert (shown["maps/maps", "width"], shown["maps/maps", "height"]) == (8, 4)
    assert (shown["verify/verify", "nrows"], shown["verify/verify", "ncols"]) == (2, 16)
    assert (shown["ppl/ppl", "nrows"], shown["ppl/ppl", "ncols"]) == (4, 20), "plain values alone"
    assert shown["report", "_type"] == "html-file"
    artifacts = {(artifact.type, alias) for artifact in records_of(run, "artifact") for alias in artifact.aliases}
    assert {("model", f"step{step}") for step in (28, 35, 40)} < artifacts
    assert {("evaluation", "latest"), ("report", "latest")} < artifacts
    summary = {
        item.key or item.nested_key[0]: item.value_json
        for record in records_of(run, "summary")
        for item in record.update
    }
    names = ("answer", "speaks_of", "first", "second", "difference", "low", "high", "tokens")
    assert json.loads(summary["verdict"]) == {name: results.verify()["verdict"][name] for name in names}
    assert points(run) == expected_points(run)
    board = EventAccumulator(str(run / "tensorboard" / "measured")).Reload()
    assert board.Images("maps/maps")[0].width == 8
    (text,) = board.Tensors("verify/verify/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert table.splitlines()[0] == (
        "answer equivalent, speaks_of these texts, first sink 1+7, second vanilla 4+4, difference -0.0012, "
        "low -0.0052, high 0.0028, tokens 12345"
    )
    assert table.splitlines()[-1].startswith("| vanilla | sink | sink 4+4 | 4 | 4 | 8 |")
    assert table.splitlines()[-1].endswith("| 3.1 |  | 0.01 |")
    assert "wandb has" in capsys.readouterr().err


def test_a_run_without_a_line_yet_is_logged_and_one_of_an_earlier_version(data, tmp_path, measured, capsys):
    run = train(data, tmp_path / "run", schedule__steps=2, logging__every=5, validation__every=1000, validation__rows=1)
    header = (run / "metrics.csv").read_text().splitlines()[0]
    (run / "metrics.csv").write_text(header + "\n")
    assert log(["--run", str(run), "--to", "tensorboard", *measured]) == 0
    assert "up to step 0" in capsys.readouterr().err
    (run / "metrics.csv").write_text("step,loss,sink_share,sink_heads\n1,0.5,0.1,0.2\n")
    assert log(["--run", str(run), "--to", "tensorboard"]) == 0
    expected = f"sink_share and sink_heads of {run} have an old definition: a mean over the queries after the sinks"
    assert expected in capsys.readouterr().err


def test_what_cannot_be_logged_is_one_line(data, tmp_path, measured, capsys):
    run = train(data, tmp_path / "run", schedule__steps=10)
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    cases = [
        (["--run", str(tmp_path)], "has no config.yaml"),
        (["--run", str(run), *measured], "was trained with neither wandb nor TensorBoard; name one with --to"),
        (["--run", str(run), "--to", "tensorboard", "--checkpoints"], "are for wandb"),
        (["--run", str(run), "--to", "tensorboard", "--results", str(tmp_path / "other.json")], "is not a result of"),
        (["--run", str(run), "--to", "tensorboard", "--maps", str(tmp_path / "empty")], "has no maps.png"),
        (["--run", str(run), "--to", "wandb", "--report", str(tmp_path / "empty")], "has no report.html"),
        (["--run", str(run), "--to", "tensorboard", "--maps", *2 * [str(tmp_path / "maps")]], "are called maps"),
    ]
    for link in ("maps/maps.png", "report/notes.txt"):
        (tmp_path / "linked" / link).parent.mkdir(parents=True)
        (tmp_path / "linked" / link).symlink_to(tmp_path / "other.json")
    (tmp_path / "linked" / "report" / "report.html").write_text("")
    (run / "checkpoints" / "step1.ckpt").symlink_to(tmp_path / "other.json")
    for words in (["--maps", tmp_path / "linked" / "maps"], ["--report", tmp_path / "linked" / "report"]):
        cases.append((["--run", str(run), "--to", "wandb", *map(str, words)], f" leads out of {words[1]}, to "))
    cases.append((["--run", str(run), "--to", "wandb", "--checkpoints"], f"step1.ckpt leads out of {run}, to "))
    capsys.readouterr()
    for words, expected in cases:
        assert log(words) == 2
        (message,) = capsys.readouterr().err.splitlines()
        assert expected in message
    assert not (run / "tensorboard").exists()
    assert not (run / "wandb").exists()
