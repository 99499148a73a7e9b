"""Guards: a run of sink-evolve, its folder, and that neither a kill nor the number of processes changes a bit of it."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
import yaml

from recipes.evolution import folder as folder_module
from recipes.evolution import journal
from recipes.evolve import run
from recipes.training.processes import signals
from recipes.training.processes.launch import free_port
from sinkmodel.checkpoint import read_metrics
from sinkmodel.memories.namm import NAMM, read_artefact
from tests.models import model_of
from tests.processes import Program
from tests.recipes.evolving import arguments, files_of, let_pass, make_inputs
from tests.recipes.logged import logged_steps, records_of


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A run of three generations that nobody touched."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        let_pass(patch)
        assert run(arguments(inputs, folder)) == 0
    return folder


def test_a_run_leaves_its_numbers_and_its_result(inputs, whole):
    """Risk: the result is not the mean with the best validation, or does not say how it was evolved."""
    state = json.loads((whole / "state.json").read_text())
    rows = read_metrics(whole)
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    assert [len(values) for values in state["fitness"]] == [4] * 3
    for row, values in zip(rows, state["fitness"]):
        assert float(row["fitness"]) == pytest.approx(sum(values) / 4)
        assert float(row["fitness_best"]) == max(values)
        assert 0 < float(row["kept"]) < 1
        assert float(row["fitness_niah_single_2"]) == pytest.approx(float(row["fitness"]))
    assert int(float(rows[-1]["tokens"])) == state["tokens"] > 3 * 4 * 200
    assert [one["generation"] for one in state["validated"]] == [2, 3]
    assert [float(row["val_fitness"]) for row in rows if row["val_fitness"]] == [
        one["fitness"] for one in state["validated"]
    ]
    best = max(state["validated"], key=lambda one: one["fitness"])
    assert best["generation"] == 2, "the best and the last are the same"
    for name, expected in (("best", best), ("last", state["validated"][-1])):
        config, parameters = read_artefact(whole / name)
        assert (config.fitness, config.evolved_on["generation"]) == (expected["fitness"], expected["generation"])
        assert (list(config.mean), list(config.variance)) == (state["mean"], state["variance"])
        assert config.seeds == (4,)
        assert config.evolved_on["host"]["fingerprint"] == state["host"]
        assert config.evolved_on["tasks"]["names"] == ["niah_single_2"]
        assert 0 < parameters.abs().max() < 1
    memory = NAMM.from_pretrained(whole / "best", model_of("llama").config)
    assert memory.namm.interval == 64
    assert yaml.safe_load((whole / "config.yaml").read_text())["fitness"]["score"] == "likelihood"
    assert {path.name for path in whole.iterdir()} == {"best", "last", "config.yaml", "metrics.csv", "state.json"}


@pytest.mark.slow
def test_two_processes_that_are_killed_are_resumed_by_one_bit_for_bit(inputs, whole, tmp_path, monkeypatch):
    """Risk: a result that depends on the number of processes or the moment of a kill; a rank that waits for ever."""
    port, processes = str(free_port()), []
    for rank in range(2):
        words = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        words |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "KILLED_AT": "3"}
        processes.append(Program("tests.recipes.evolving", arguments(inputs, tmp_path / "run"), words))
    stderr = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [-signal.SIGKILL, 1], stderr
    assert "in 2 groups on 2 process(es)" in stderr[0]
    assert "rank 1" in stderr[1]
    assert "has lost the others" in stderr[1]
    assert "generation 1" not in stderr[1], "all processes report"
    assert len(read_metrics(tmp_path / "run")) == 3, "it was not killed between its line and its state"
    assert len(json.loads((tmp_path / "run" / "state.json").read_text())["fitness"]) == 2
    let_pass(monkeypatch)
    assert run(arguments(inputs, tmp_path / "run")) == 0
    assert files_of(tmp_path / "run") == files_of(whole)


class Ended(BaseException):
    """Nothing may catch it."""


@pytest.mark.parametrize(
    ("place", "name", "call"),
    [(journal, "write_state", 2), (folder_module, "write_artefact", 3), (journal, "kept_of", 2)],
)
def test_a_run_that_ends_anywhere_is_resumed_bit_for_bit(
    inputs, whole, tmp_path, monkeypatch, capsys, place, name, call
):
    """Risk: what is written before a state, such as an artefact that is being replaced, survives its generation."""
    let_pass(monkeypatch)
    calls, act = 0, getattr(place, name)

    def end(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            raise Ended
        return act(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, end)
        with pytest.raises(Ended):
            run(arguments(inputs, tmp_path / "run"))
    assert run(arguments(inputs, tmp_path / "run")) == 0
    assert files_of(tmp_path / "run") == files_of(whole)


def test_a_result_that_is_lost_or_damaged_is_made_again(inputs, whole, tmp_path, monkeypatch):
    """Risk: a kill between removing an artefact and writing it leaves a run without a result."""
    let_pass(monkeypatch)
    assert run(arguments(inputs, tmp_path / "run")) == 0
    before = files_of(tmp_path / "run")
    assert before == files_of(whole)
    (tmp_path / "run" / "best").rename(tmp_path / "run" / ".best.old.part")
    (tmp_path / "run" / "last" / "namm.safetensors").write_bytes(b"")
    assert run(arguments(inputs, tmp_path / "run")) == 0
    assert files_of(tmp_path / "run") == before


def test_a_run_can_be_made_longer(inputs, whole, tmp_path, monkeypatch, capsys):
    """Risk: a run of two generations that is resumed with three is another one than that of three."""
    let_pass(monkeypatch)
    assert run(arguments(inputs, tmp_path / "run", generations=2)) == 0
    assert run(arguments(inputs, tmp_path / "run")) == 0
    assert "resuming after generation 2" in capsys.readouterr().err
    assert files_of(tmp_path / "run") == files_of(whole)


def test_a_signal_stops_a_run_saved(inputs, whole, tmp_path, monkeypatch, capsys):
    """Risk: a job that is preempted loses its generation, or its exit code is that of a run which is complete."""
    let_pass(monkeypatch)
    write = journal.write_state

    def write_and_signal(*arguments):
        write(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(journal, "write_state", write_and_signal)
        assert run(arguments(inputs, tmp_path / "run")) == 128 + signal.SIGTERM
    assert signals.received is None
    assert "stopped after generation 1 of 3, saved" in capsys.readouterr().err
    assert run(["--config", str(tmp_path / "run" / "config.yaml")]) == 0
    assert files_of(tmp_path / "run") == files_of(whole)


def test_a_size_penalty_and_matches_are_what_is_selected_by(inputs, whole, tmp_path, monkeypatch):
    """Risk: an option that changes nothing."""
    let_pass(monkeypatch)
    penal = tmp_path / "penalty"
    assert run(arguments(inputs, penal, generations=1, fitness__size_penalty=0.5)) == 0
    one, other = (json.loads((folder / "state.json").read_text()) for folder in (whole, penal))
    assert torch.tensor(other["fitness"][0]).lt(torch.tensor(one["fitness"][0])).all()
    row = read_metrics(penal)[0]
    expected = float(row["fitness_niah_single_2"]) - 0.5 * float(row["kept"])
    assert float(row["fitness"]) == pytest.approx(expected)
    match = arguments(inputs, tmp_path / "match", generations=1, fitness__score="match", tasks__answer_tokens=2)
    assert run(match) == 0
    assert set(json.loads((tmp_path / "match" / "state.json").read_text())["fitness"][0]) == {0.0}


def test_wandb_has_each_generation_once(inputs, tmp_path, monkeypatch):
    """Risk: a resumed run is another one for wandb, or its generations are there twice or not at all."""
    let_pass(monkeypatch)
    for name, value in {"WANDB_MODE": "offline", "HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "run"
    for generations in (1, 2):
        assert run(arguments(inputs, folder, generations=generations, logging__wandb="true")) == 0
    assert logged_steps(folder) == [1, 2]
    (known,) = records_of(folder, "run")
    assert list(known.tags) == ["namm", "niah_single_2"]
    assert known.run_group.startswith("namm-")


def test_tensorboard_has_a_curve_of_generations(inputs, tmp_path, monkeypatch):
    """Risk: a copy of metrics.csv that lacks generations after a resume."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    let_pass(monkeypatch)
    for generations in (1, 2):
        assert run(arguments(inputs, tmp_path / "run", generations=generations, logging__tensorboard="true")) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("fitness")] == [1, 2]
