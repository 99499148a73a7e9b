"""Guards: the evolved memories that come with the package are whole, small, and found by their names."""

from __future__ import annotations

import re

import pytest
import torch

from sinkmodel.errors import UserError
from sinkmodel.memories import NAMM, make_memory
from sinkmodel.memories.namm import read_artefact
from sinkmodel.memories.namm.config import SHIPPED
from tests.models import model_of, tokens

NAMES = sorted(path.name for path in SHIPPED.iterdir())


def test_one_is_shipped():
    assert NAMES == ["namm-recall"]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small_and_says_how_it_was_made(name):
    config, parameters = read_artefact(name)
    assert config.seeds
    assert config.fitness is not None
    assert re.fullmatch("[0-9a-f]{40}", config.commit or "")
    assert config.evolved_on["tasks"]
    assert len(parameters) == config.parameters == 4172
    assert sum(path.stat().st_size for path in (SHIPPED / name).iterdir()) < 30_000
    made = (SHIPPED / name / "README.md").read_text(encoding="utf-8")
    assert "\nsink-evolve --config namm " in made
    assert f"--seed {config.seeds[0]} " in made


@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_some_tokens_and_evicts_others(name):
    llama = model_of("llama", max_position_embeddings=512)
    memory = make_memory("namm", llama, artefact=name)
    read = 2 * memory.namm.interval
    llama(torch.tensor([tokens(read)]), past_key_values=memory)
    kept = [len(positions) for layer in range(len(memory.layers)) for positions in memory.kept_positions(layer)]
    assert len(kept) == 4
    assert 0 < sum(kept) < 4 * read


def test_a_folder_of_the_same_name_is_preferred(tmp_path, monkeypatch):
    """As for a model: what the user has here is what is meant."""
    config, parameters = read_artefact(NAMES[0])
    NAMM(model_of("llama"), config.replace(fitness=-1.0), parameters).save_pretrained(tmp_path / NAMES[0])
    monkeypatch.chdir(tmp_path)
    assert read_artefact(NAMES[0])[0].fitness == -1


def test_other_names_and_revisions_are_one_line():
    with pytest.raises(UserError, match="namm-other is not a folder with a NAMM.* or namm-recall, which comes with"):
        read_artefact("namm-other")
    with pytest.raises(UserError, match="namm-recall comes with this package and has no revision v1; leave it out"):
        read_artefact("namm-recall", "v1")
