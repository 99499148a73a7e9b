"""Guards: the optimiser, its fitness and its population; and inputs that must be refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from recipes.evolution import population
from recipes.evolution.fitness import Measured, fitness_of, kept_of
from recipes.evolution.loop import evolve
from recipes.evolution.optimizer import Evolution
from recipes.evolution.settings import CmaSettings, TaskSettings
from recipes.evolve import run
from recipes.training.processes import signals
from recipes.training.processes.ranks import World
from tests.recipes.evolving import arguments, let_pass, make_inputs
from tests.tiny import base_folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def known(generation: int, candidates: np.ndarray) -> np.ndarray:
    """Highest, 0, if every number is 0.3."""
    return -np.square(candidates - 0.3).sum(axis=1)


@pytest.mark.parametrize("kind", ["separable", "full"])
def test_evolution_improves_a_known_function(kind):
    """Risk: the worst are selected, or fitnesses reach other candidates than those that they belong to."""
    evolution = Evolution(6, 12, CmaSettings(kind, 0.1), seed=0)
    assert (evolution.mean == 0).all()
    done = []
    found = evolve(evolution, known, 0, 60, lambda generation, values: done.append((generation, values.max())))
    assert found == (60, 0)
    assert [generation for generation, _ in done] == list(range(1, 61))
    assert np.abs(evolution.mean - 0.3).max() < 1e-3
    assert done[-1][1] > -1e-5


@pytest.mark.parametrize("kind", ["separable", "full"])
def test_the_optimiser_is_replayed_from_fitnesses_bit_for_bit(kind):
    """Risk: a resumed run draws other candidates than the run that was not stopped."""
    settings = CmaSettings(kind, 0.065)
    whole, past = Evolution(40, 8, settings, seed=3), []
    evolve(whole, known, 0, 7, lambda generation, values: past.append(values.tolist()))
    resumed = Evolution(40, 8, settings, seed=3)
    resumed.replay(past)
    assert (resumed.generation, resumed.digest, resumed.sigma) == (7, whole.digest, whole.sigma)
    assert (resumed.ask() == whole.ask()).all()
    other = Evolution(40, 8, settings, seed=4)
    other.replay(past)
    assert other.digest != whole.digest, "the seed decides nothing"


def test_a_signal_ends_the_loop_after_the_generation(monkeypatch):
    """Risk: a run that should stop continues until its time is over, or loses the generation that it has finished."""
    noted = []

    def after(generation, values):
        noted.append(generation)
        if generation == 5:
            monkeypatch.setattr(signals, "received", 15)

    evolution = Evolution(4, 4, CmaSettings(), seed=0)
    assert evolve(evolution, known, 3, 9, after) == (5, 15)
    assert noted == [4, 5]
    assert evolve(evolution, known, 5, 9, after) == (5, 15), "asked before it begins"


def measured(score, full, kept, task="a") -> Measured:
    return Measured(task, np.array(score), np.array(kept), np.array(full))


def test_fitness_is_the_mean_over_tasks_of_the_ratio_to_the_full_cache():
    """Risk: prompts, tasks or candidates are mixed; a penalty that is paid for what is forgotten."""
    a = measured([[0.2, 0.4], [0.6, 0.6]], [0.5, 0.7], [[0.5, 0.7], [1.0, 1.0]])
    b = measured([[0.1], [0.2]], [0.1], [[0.2], [1.0]], "b")
    assert fitness_of([a], 0) == pytest.approx([0.3 / 0.6, 1.0])
    assert fitness_of([a, b], 0) == pytest.approx([(0.5 + 1) / 2, (1 + 2) / 2])
    assert kept_of([a, b]) == pytest.approx([0.4, 1.0])
    assert fitness_of([a, b], 0.1) == pytest.approx([0.75 - 0.04, 1.5 - 0.1])


def test_a_task_that_the_full_cache_fails_does_not_count():
    """Risk: a division by 0, of which the whole population is NaN."""
    a, nothing = measured([[0.3], [0.6]], [0.6], [[1.0], [1.0]]), measured([[0.0], [0.0]], [0.0], [[1.0], [1.0]])
    assert fitness_of([a, nothing], 0) == pytest.approx([0.5, 1.0])
    assert fitness_of([nothing], 0.5) == pytest.approx([-0.5, -0.5])


def test_tasks_join_in_stages():
    """Risk: a task that joins later replaces the first one, or joins a generation late."""
    tasks = TaskSettings(names=["vt", "cwe", "fwe"], begin=[0, 10, 20])
    names = {generation: [task.name for task in tasks.at(generation)] for generation in (0, 9, 10, 19, 20)}
    assert names == {0: ["vt"], 9: ["vt"], 10: ["vt", "cwe"], 19: ["vt", "cwe"], 20: ["vt", "cwe", "fwe"]}
    assert len(TaskSettings(names=["vt", "cwe"]).at(0)) == 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_groups_of_candidates_are_shared_and_come_back_in_order(monkeypatch, ranks):
    """Risk: a candidate gets another one's fitness if there are several processes."""
    candidates, sizes = np.arange(22.0).reshape(11, 2), []

    def evaluate(groups):
        sizes.extend(len(group) for group in groups)
        return [{"score": 10 * group[:, :1], "kept": group[:, 0]} for group in groups]

    parts: list = []

    def from_all(found):
        parts.append(found)
        if len(parts) < ranks:
            raise InterruptedError  # a rank that waits for the others
        return parts

    monkeypatch.setattr(population, "from_all", from_all)
    for rank in range(ranks - 1):
        with pytest.raises(InterruptedError):
            population.shared(evaluate, candidates, 3, World(rank, ranks))
    result = population.shared(evaluate, candidates, 3, World(ranks - 1, ranks))
    assert (result["score"][:, 0] == 10 * candidates[:, 0]).all()
    assert (result["kept"] == candidates[:, 0]).all()
    assert sorted(sizes) == [2, 3, 3, 3], "each group once, of the same size"


REFUSED = [
    ({"population": 3}, "population is 3; it must be at least 4 candidates"),
    ({"namm__interval": 18}, "namm: hop 4 does not divide interval 18; make interval a multiple of hop"),
    ({"namm__gamma": 1.5}, "namm: gamma is 1.5"),
    ({"tasks__names": "[key_valu]"}, "there is no task 'key_valu'; did you mean key_value?"),
    ({"tasks__names": "[vt,vt]"}, "twice"),
    ({"tasks__begin": "[3]"}, "tasks.begin is [3] for 1 tasks"),
    ({"text": None}, "niah_single_2: the haystack is taken from your own files; give --text"),
    ({"validation_text": None}, "give --validation-text"),
    ({"tasks__names": "[vt]"}, "none of the tasks reads --text"),
    ({"text": "nowhere.txt"}, "--text nowhere.txt is not a file"),
    ({"validation_text": "{text}"}, "is the same text as --text"),
    ({"validation_text": "{copy}"}, "is the same text as --text"),
    ({"tasks__length": 1024}, "does not fit into the 1024 positions"),
    ({"namm__interval": 512}, "namm.interval 512 is not below tasks.length 460"),
    ({"tasks__length": 100}, "validation prompts: --tasks.length 100 is too short for niah_single_2"),
    ({"model": "nowhere"}, "nowhere"),
    ({"model": "{gptj}"}, "model type 'gptj' does not send its attention through"),
    ({"fitness__score": "size"}, "fitness.score is 'size'; choose one of likelihood, match, or null"),
    ({"fitness__size_penalty": -1}, "fitness.size_penalty"),
    ({"cma__sigma": 0}, "cma.sigma"),
    ({"compute__candidates": 0}, "compute.candidates is 0"),
    ({"compute__processes": 1, "generations": 0}, "generations is 0"),
    ({}, "cannot do niah_single_2 with a full cache: it gains"),
    ({"fitness__score": "match", "tasks__answer_tokens": 2}, "cannot do niah_single_2 with a full cache: it scores 0%"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_bad_input_is_one_line_before_anything_is_written(inputs, tmp_path, capsys, changes, message):
    """Risk: a traceback, or a run folder that holds something, after input that can never work."""
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(inputs["text"]).read_bytes())
    names = {"{text}": inputs["text"], "{copy}": str(copy)}
    if "{gptj}" in changes.values():
        names["{gptj}"] = str(base_folder(tmp_path / "gptj", "gptj", max_position_embeddings=1024))
    changes = {key: names.get(value, value) for key, value in changes.items()}
    assert run(arguments(inputs, tmp_path / "run", **changes)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("sink-evolve: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_tasks_settings_model_and_texts(inputs, tmp_path, capsys, monkeypatch):
    """Risk: fitnesses of one evolution steer another one."""
    let_pass(monkeypatch)
    folder = tmp_path / "run"
    assert run(arguments(inputs, folder, generations=1)) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = make_inputs(tmp_path / "other")
    refused = [
        (
            {"tasks__names": "[verbatim]"},
            "niah_single_2'], this one has ['verbatim']; resume with --tasks.names",
        ),
        ({"population": 6}, "with population = 4, this one has 6; resume with --population 4"),
        ({"seed": 1}, "seed"),
        ({"compute__candidates": 4}, "compute.candidates"),
        ({"fitness__score": "match"}, "fitness.score"),
        ({"text": other["validation_text"], "validation_text": other["text"]}, "other files for --text"),
        ({"generations": 1, "tasks__prompts": 2}, "tasks.prompts"),
    ]
    for changes, message in refused:
        assert run(arguments(inputs, folder, **{"generations": 2, **changes})) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    state = folder / "state.json"
    state.write_text(state.read_text().replace('"host": "', '"host": "0'))
    assert run(arguments(inputs, folder, generations=2)) == 2
    assert "a model with other weights" in capsys.readouterr().err
    state.write_bytes(before[state])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert run(arguments(inputs, folder, generations=2)) == 0
    assert run(arguments(inputs, folder, generations=1)) == 2
    assert "has done 2 generations, more than --generations 1" in capsys.readouterr().err


def shorter(state: str) -> str:
    content = json.loads(state)
    content["fitness"][0].pop()
    return json.dumps(content)


def test_a_damaged_state_is_one_line(inputs, tmp_path, capsys, monkeypatch):
    """Risk: a traceback, or a run that starts from the beginning over what is left of another one."""
    let_pass(monkeypatch)
    folder = tmp_path / "run"
    assert run(arguments(inputs, folder, generations=1)) == 0
    path = folder / "state.json"
    state = path.read_text()
    damages = [
        "{",
        "[]",
        '{"format": "sinkmodel-evolution", "version": 1}',
        shorter(state),
        state.replace("[[", "[[NaN, "),
    ]
    for damage in damages:
        path.write_text(damage)
        assert run(arguments(inputs, folder, generations=2)) == 2
        assert str(path) in capsys.readouterr().err.strip().splitlines()[-1]
        assert path.read_text() == damage
    path.write_text(state.replace('"version": 1', '"version": 2'))
    assert run(arguments(inputs, folder, generations=2)) == 2
    assert "has version 2, and this program reads 1" in capsys.readouterr().err
    (folder / "config.yaml").unlink()
    assert run(arguments(inputs, folder, generations=2)) == 2
    assert "already holds something else" in capsys.readouterr().err
