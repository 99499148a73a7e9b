"""Guards: what the host measures of candidates in a batch is what each of them would do alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from eval.measures.longcontext.answers import Reader
from recipes.evolution.host import Host, is_able, kept_share
from recipes.evolution.prompts import read_prompts
from recipes.evolution.settings import TASKS, EvolveConfig, FitnessSettings, TaskSettings
from sinkmodel.loading import load_model
from sinkmodel.memories import make_memory
from sinkmodel.memories.namm import NAMM, NAMMConfig, measure_statistics
from tests.recipes.evolving import make_inputs

NAMES = ["key_value", "niah_single_1"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def loaded(inputs):
    return load_model(inputs["model"])


def cell_of(inputs, loaded, name="key_value", score="likelihood", prompts=2, generation=0, part="training"):
    tasks = TaskSettings(names=NAMES, length=420, answer_tokens=6)
    config = EvolveConfig(**inputs, output="-", tasks=tasks, fitness=FitnessSettings(score))
    return read_prompts(config).cell(loaded, TASKS[name], part, prompts, generation)


@pytest.fixture(scope="module")
def namm(inputs, loaded):
    contexts = [torch.tensor([reading.context]) for reading in cell_of(inputs, loaded).readings]
    return measure_statistics(loaded.model, contexts, NAMMConfig(window=8, hop=4, interval=64))


def candidates(namm: NAMMConfig, count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.3, (count, namm.parameters))


def test_candidates_in_a_batch_do_what_each_does_alone(inputs, loaded, namm):
    """Risk: rows of a batch see each other, or what is read once for all is more than what comes before a decision."""
    cell, population = cell_of(inputs, loaded), candidates(namm, 3)
    host = Host(loaded, namm, False)
    (together,) = host.of_groups(cell, [population])
    assert together["score"].shape == together["kept"].shape == (3, 2)
    for row, candidate in enumerate(population):
        for place, reading in enumerate(cell.readings):
            memory = NAMM(loaded.model, namm, torch.tensor(candidate, dtype=torch.float32))
            loaded.model(torch.tensor([reading.context]), past_key_values=memory)
            assert together["kept"][row, place] == pytest.approx(kept_share(memory).item(), abs=1e-9)
            scores = []
            for asked in reading.asked:
                ids = torch.tensor([[*asked.ids, *asked.candidates[0]]])
                with torch.no_grad():
                    logits = loaded.model(ids, past_key_values=memory.fork()).logits[0]
                answer = asked.candidates[0]
                chosen = logits.log_softmax(-1)[-len(answer) - 1 : -1].gather(-1, torch.tensor(answer)[:, None])
                scores.append(chosen.mean().exp().item())
            assert together["score"][row, place] == pytest.approx(np.mean(scores), rel=1e-4)
    assert ((together["kept"] > 0.1) & (together["kept"] < 0.95)).sum() > 2, "nothing is forgotten, or all of it"
    assert len(set(together["score"].ravel().round(9))) == 6


def test_groups_are_read_as_one_population(inputs, loaded, namm):
    """Risk: a group changes what the next one finds of the part that is read once."""
    cell, population = cell_of(inputs, loaded), candidates(namm, 4)
    host = Host(loaded, namm, False)
    first, second = host.of_groups(cell, [population[:2], population[2:]])
    for name in ("score", "kept"):
        alone = host.of_groups(cell, [population[2:]])[0][name]
        assert (second[name] == alone).all()
        assert not np.array_equal(first[name], alone)
    assert host.of_groups(cell, []) == []


def test_parameters_of_zero_are_the_full_cache(inputs, loaded, namm):
    """Risk: evolution starts elsewhere than at a fitness of 1, or the full cache is asked in another way."""
    cell = cell_of(inputs, loaded)
    (zero,) = Host(loaded, namm, False).of_groups(cell, [np.zeros((1, namm.parameters))])
    full = Host(loaded, None, False).of_full_cache(cell)
    assert (zero["kept"] == 1).all()
    assert zero["score"][0] == pytest.approx([read.score_R.item() for read in full], rel=1e-5)
    assert [read.kept_R.item() for read in full] == [1, 1]


@pytest.mark.parametrize("name", NAMES)
def test_the_full_cache_is_scored_as_sink_eval_does(inputs, loaded, name):
    """Risk: a fitness that is not what `sink-eval longcontext` measures, by generation or by nats."""
    cell = cell_of(inputs, loaded, name, "match")
    reader, dense = Reader(loaded), make_memory("dense", loaded.model)
    host = Host(loaded, None, True)
    found = host.of_full_cache(cell)
    for reading, read in zip(cell.readings, found):
        answers, _, _ = reader.ask(dense, reading, "outside", cell.metric)
        assert read.score_R.item() == pytest.approx(np.mean([answer.score for answer in answers]), abs=1e-9)
        assert read.nll_R.item() == pytest.approx(np.mean([answer.nll for answer in answers]), rel=1e-5)
        alone = np.mean([reader.nll_alone(asked) for asked in reading.asked])
        assert host.nll_alone(reading) == pytest.approx(alone, rel=1e-5)


def test_rows_generate_each_its_own_answer(inputs, loaded, namm, monkeypatch):
    """Risk: all rows get the first row's text, or one that has ended continues."""
    cell = cell_of(inputs, loaded, "niah_single_1", "match", 1)
    (asked,) = cell.readings[0].asked
    texts: list[str] = []
    metric = type(cell.metric)("length", lambda text, question: texts.append(text) or len(text), lambda *_: False)
    host = Host(loaded, namm, True)
    population = candidates(namm, 3)
    memories = host._memories(cell.readings[0], [torch.tensor(population, dtype=torch.float32)])
    together = host._matches(next(memories).fork(), asked, metric, 3)
    several = [*texts]
    texts.clear()
    for candidate in population:
        alone = host._memories(cell.readings[0], [torch.tensor(candidate[None], dtype=torch.float32)])
        host._matches(next(alone).fork(), asked, metric, 1)
    assert several == texts
    assert len(set(several)) > 1
    assert together.tolist() == [len(text) for text in several]


def test_prompts_are_new_in_each_generation_and_apart_in_each_part(inputs, loaded):
    """Risk: candidates are selected on the prompts that validate them, or on the same ones in every generation."""
    contexts = {
        (part, generation): tuple(reading.context)
        for part, generation in (("training", 0), ("training", 1), ("statistics", 0), ("validation", 0))
        for reading in cell_of(inputs, loaded, "niah_single_1", generation=generation, part=part, prompts=1).readings
    }
    assert len(set(contexts.values())) == 4
    again = cell_of(inputs, loaded, "niah_single_1", generation=1, prompts=1).readings[0].context
    assert tuple(again) == contexts["training", 1]
    training = loaded.tokenizer.decode(cell_of(inputs, loaded).readings[0].context)
    words = {word for word in training.split() if word.endswith(":")}
    books = {option: Path(inputs[option]).read_text().lower() for option in ("text", "validation_text")}
    assert all(word.strip(":") in books["text"] for word in words)
    assert not any(word.strip(":") in books["validation_text"] for word in words)


def test_a_task_counts_if_the_full_cache_can_do_it():
    """Risk: a task is taken whose score is chance, or one that the model can do is refused."""
    from recipes.evolution.host import Read

    reads = [Read(torch.tensor([score]), torch.tensor([nll]), torch.ones(1)) for score, nll in ((0.2, 1.0), (0.8, 2.0))]
    assert is_able(reads, [2.0, 3.0], match=False) == (True, pytest.approx(0.5), pytest.approx(1.0))
    assert is_able(reads, [2.0, 2.9], match=False)[0] is False
    assert is_able(reads, [0.0, 0.0], match=True)[0] is True
    assert is_able(reads[:1], [9.0], match=True)[0] is False
