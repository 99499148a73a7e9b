"""Guards `sink-eval longcontext`: one command from a model's name to rows, and one line for what a user gets wrong."""

from __future__ import annotations

import csv
import json
import re

import pytest

from eval.cli import main
from eval.measures.longcontext import longcontext as command
from eval.measures.longcontext import measure as module
from sinkmodel.results.files import content_of, read_result

pytestmark = pytest.mark.usefixtures("memories")
KEYS = "niah_multikey_2"
SMALL = ["--samples", 5, "--length", 1200, "--budgets", 64, "--distractors", 2, "--answer-tokens", 3]


@pytest.fixture
def no_floor(monkeypatch):
    """A random model can do nothing, and its cells count all the same."""
    monkeypatch.setattr(module, "FLOOR_SCORE", 0.0)


def longcontext(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["longcontext", *map(str, arguments)])
    return (code, *capsys.readouterr())


def result_of(capsys, path, *arguments) -> dict:
    code, _, err = longcontext(capsys, *arguments, "--json", path)
    assert code == 0, err
    content = json.loads(path.read_text())
    assert content_of(read_result(path)) == content  # a report reads it, and nothing is lost
    return content


@pytest.fixture
def longbench(tmp_path):
    rows = [
        {"input": f"Who came {n}?", "context": "Anna came. " * 200, "answers": ["Anna"], "dataset": "hotpotqa"}
        for n in range(7)
    ]
    path = tmp_path / "hotpotqa.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_every_task_gives_a_row_for_every_memory_and_budget(run, book, longbench, no_floor, tmp_path, capsys):
    tasks = ["niah_multiquery", "passages"]
    result = result_of(
        capsys, tmp_path / "out.json", "--model", run, "--tasks", *tasks, "--text", book, "--longbench", longbench,
        "--memories", "snapkv", "dense", "tova", *SMALL, "--budgets", 64, 32, "--csv", tmp_path / "out.csv",
    )  # fmt: skip
    labels = ["dense", "snapkv 32", "snapkv 64", "tova 32", "tova 64"]
    assert [(row["task"], row["label"]) for row in result["rows"]] == [
        (task, label) for task in [*tasks, "hotpotqa"] for label in labels
    ]
    for row in result["rows"]:
        assert row["contexts"] == 5
        assert (row["questions"] > 5) == (row["task"] == "passages")
        assert row["question"] == result["question"] == "outside"
        assert row["metric"] == ("f1" if row["task"] == "hotpotqa" else "contained")
        assert (row["rank"] is None) == (row["task"] == "hotpotqa")
        assert row["length"] == 1200
        assert 0.8 * 1200 < row["prompt_tokens"] <= 1202
        assert not row["floor"]
        assert 0 <= row["exact"] <= 1
        if row["memory"] != "dense":
            assert row["nll_low"] <= row["nll_difference"] <= row["nll_high"]
            assert row["bytes_held"] == row["budget"] * 2 * 2 * 2 * 8 * 4, "layers, heads, K and V, size, fp32"
    same = {label: [row["nll"] for row in result["rows"] if row["label"] == label] for label in labels}
    assert same["snapkv 32"] == same["tova 32"] != same["snapkv 64"], "equal stand-ins read equal samples"
    assert (result["command"], result["seed"], result["floor_gain"]) == ("longcontext", 0, 1.0)
    assert [of["file"] for of in result["texts"]] == [str(book)]
    assert [(of["file"], of["rows"]) for of in result["longbench"]] == [(str(longbench), 5)]
    assert "out.csv" not in result["command_line"]
    with (tmp_path / "out.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [(row["task"], row["label"]) for row in table] == [(row["task"], row["label"]) for row in result["rows"]]
    assert [float(row["nll"]) for row in table] == [row["nll"] for row in result["rows"]]
    assert table[0]["score_difference"] == ""


def test_the_same_seed_gives_the_same_numbers_whatever_else_is_measured(run, no_floor, tmp_path, capsys):
    """Risk: samples that depend on the other tasks, on the memories or on the number of samples."""
    arguments = ["--model", run, *SMALL]
    one = result_of(capsys, tmp_path / "1.json", *arguments, "--tasks", "niah_single_1", KEYS, "--memories", "snapkv")
    two = result_of(
        capsys, tmp_path / "2.json", *arguments, "--tasks", KEYS, "--memories", "tova", "snapkv", "--samples", 6
    )
    three = result_of(capsys, tmp_path / "3.json", *arguments, "--tasks", KEYS, "--memories", "snapkv", "--seed", 1)

    def nll(result):
        (row,) = [row for row in result["rows"] if (row["task"], row["label"]) == (KEYS, "snapkv 64")]
        return row["by_context"]["nll"][:5]

    assert nll(one) == nll(two)
    assert not set(nll(one)) & set(nll(three))


def test_the_question_is_outside_or_inside_of_what_is_compressed(run, no_floor, tmp_path, capsys):
    arguments = ["--model", run, *SMALL, "--tasks", "niah_single_1", "--memories", "snapkv"]
    outside = result_of(capsys, tmp_path / "1.json", *arguments)["rows"]
    inside = result_of(capsys, tmp_path / "2.json", *arguments, "--question", "inside")["rows"]
    assert {row["question"] for row in inside} == {"inside"}
    assert outside[0]["nll"] == pytest.approx(inside[0]["nll"], abs=1e-4), "for dense it is the same"
    assert outside[1]["nll"] != pytest.approx(inside[1]["nll"], abs=1e-3)
    assert inside[0]["bytes_held"] > outside[0]["bytes_held"]


def test_at_the_floor_the_table_says_so(run, tmp_path, capsys):
    arguments = ["--model", run, *SMALL, "--tasks", "niah_single_1", "--memories", "snapkv"]
    code, out, err = longcontext(capsys, *arguments, "--json", tmp_path / "out.json")
    assert code == 0, err
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["floor"] for row in rows] == [True, True]
    assert rows[1]["nll"] is None
    (line,) = [line for line in out.splitlines() if "snapkv 64" in line]
    assert "floor" in line
    (line,) = [line for line in out.splitlines() if " dense " in line and "niah_single_1 " in line]
    assert re.search(r" 0\.0 +floor .* gain -?0\.\d\d ", line)
    assert "the other memories were not run" in " ".join(out.split())


def test_the_table_has_differences_with_intervals(run, no_floor, capsys):
    arguments = ["--model", run, *SMALL, "--tasks", "niah_single_1", "--memories", "snapkv"]
    code, out, _ = longcontext(capsys, *arguments)
    assert code == 0
    (line,) = [line for line in out.splitlines() if "snapkv 64" in line]
    assert re.search(r"\+0\.0 \[-\d+\.\d, \+\d+\.\d\]", line)
    assert re.search(r"[+-]\d\.\d\d \[[+-]\d\.\d\d, [+-]\d\.\d\d\]", line)


def test_groups_lengths_and_defaults(run, no_floor, tmp_path, capsys):
    result = result_of(
        capsys, tmp_path / "o.json", "--model", run, "--tasks", "niah_single_1", "niah_single_1", "--length", 700, 600,
        "--samples", 2, "--distractors", 0, "--answer-tokens", 2,
    )  # fmt: skip
    assert [(row["length"], row["label"]) for row in result["rows"]] == [
        (length, label) for length in (600, 700) for label in ("dense", "snapkv 256", "tova 256")
    ]
    assert {row["rank"] for row in result["rows"]} == {None}


def test_what_is_measured_outlives_a_cell_that_fails(run, no_floor, tmp_path, monkeypatch, capsys):
    """Risk: hours lost with an error in the last cell."""
    of_cell = command.measure_cell

    def failing(reader, cell, *rest):
        if cell.task == KEYS:
            raise KeyboardInterrupt
        return of_cell(reader, cell, *rest)

    monkeypatch.setattr(command, "measure_cell", failing)
    code, out, _ = longcontext(
        capsys, "--model", run, *SMALL, "--tasks", "niah_single_1", KEYS, "--json", tmp_path / "o.json"
    )
    assert code == 130
    assert {row["task"] for row in json.loads((tmp_path / "o.json").read_text())["rows"]} == {"niah_single_1"}
    assert "niah_single_1" in out


def test_a_budget_that_holds_everything_is_said(run, no_floor, capsys):
    arguments = ["--model", run, *SMALL, "--tasks", "niah_single_1", "--memories", "snapkv", "--budgets", 1300]
    code, _, err = longcontext(capsys, *arguments)
    assert code == 0
    assert "--budgets 1300 holds a whole prompt of --length 1200: nothing is forgotten" in err
    assert "fewer than" not in err


def test_few_samples_are_said_to_give_no_interval(run, no_floor, capsys):
    code, _, err = longcontext(
        capsys, "--model", run, *SMALL, "--tasks", "niah_single_1", "--memories", "snapkv", "--samples", 4
    )
    assert code == 0
    assert "--samples 4: fewer than 5 contexts give no interval" in err


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no task: give --tasks, such as ruler or niah_single_1, or --longbench files"),
        (["--tasks", "niah_single_4"], r"there is no task 'niah_single_4'; did you mean niah_single_\d\?"),
        (["--tasks", "zzz"], "there is no task 'zzz'; choose among ruler, text, niah_single_1, "),
        (["--tasks", "niah_single_2"], "niah_single_2 takes its haystack from --text; give one"),
        (["--tasks", "text"], "passages, key_value, verbatim take their haystack from --text; give one"),
        (["--tasks", "vt", "--text", "book.txt"], "none of the tasks reads --text; leave it out"),
        (["--tasks", "passages", "--text", "none.txt"], "none.txt does not exist"),
        (["--tasks", "passages", "--text", "book.txt", "book.txt"], "--text has book.txt twice"),
        (["--tasks", "passages", "--text", "empty.txt"], "empty.txt is empty; give a file with text"),
        (["--tasks", "vt", "--memories", "snapkb"], r"there is no memory 'snapkb'; did you mean snapkv\?"),
        (["--tasks", "vt", "--memories", "zzz"], "there is no memory 'zzz'; choose among dense, snapkv, tova"),
        (["--tasks", "vt", "--budgets", 0], "--budgets"),
        (["--tasks", "vt", "--length", "long"], "--length"),
        (["--tasks", "vt", "--question", "beside"], "--question"),
        (["--tasks", "vt", "--json", "none/out.json"], "none does not exist"),
        (["--tasks", "vt", "--csv", "none/out.csv"], "--csv none/out.csv: the folder .*none does not exist"),
        (["--tasks", "vt", "--csv", "a", "--json", "a"], "--csv and --json are both a; give two names"),
        (["--longbench", "none.jsonl"], "none.jsonl does not exist"),
        (["--longbench", "other.jsonl", "./other.jsonl"], "--longbench has other.jsonl twice"),
        (["--longbench", "bad.jsonl"], "bad.jsonl:1: no key 'input'"),
        (["--longbench", "other.jsonl"], "other.jsonl:1: the data set 'squad' is not one of LongBench's"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("One. Two.")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"question": "a?"}')
    (tmp_path / "other.jsonl").write_text('{"input": "", "context": "x", "answers": ["x"], "dataset": "squad"}')
    before = set(tmp_path.iterdir())
    code, out, err = longcontext(capsys, "--model", "no-such-model", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert re.search(message, err), err
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", 4095], "--length 4095 is longer than the 4096 positions of .*, 2 of them for the tokens "
         "in front; use --length 4094 or less"),
        (["--length", 100], "--length 100 is too short for vt, whose shortest prompt and answer take"),
        (["--budgets", 2, 64], "snapkv at --budgets 2: budget is 2; make snapkv at least 3"),
        (["--tasks", "passages", "--text", "short.txt"], "passages runs out of text at --length 1024"),
        (["--longbench", "hotpotqa.jsonl", "--length", 32], "leaves no room for a prompt of hotpotqa beside the 32"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_one_line(run, longbench, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("One. Two.")
    tasks = [] if {"--tasks", "--longbench"} & set(arguments) else ["--tasks", "vt"]
    code, out, err = longcontext(capsys, "--model", run, *tasks, *arguments, "--json", "out.json")
    assert (code, out) == (2, ""), err
    last = err.splitlines()[-1]
    assert re.search(message, last), err
    assert not (tmp_path / "out.json").exists()
