"""Guards: the evolved NAMMs that come with the package can be read by name, name their origin, and forget something."""

from __future__ import annotations

import json

import pytest
import torch

from sinkmodel.memories import NAMM, make_memory
from sinkmodel.memories.namm.config import CONFIG, SHIPPED, read_artefact, shipped
from tests.models import model_of, tokens


def test_one_is_shipped():
    assert shipped() == ["namm-recall"]


@pytest.mark.parametrize("name", shipped())
def test_it_is_small_and_says_how_it_was_evolved(name):
    about = json.loads((SHIPPED / name / CONFIG).read_text(encoding="utf-8"))
    assert {"host", "tasks", "texts", "fitness", "cma", "versions"} <= about["evolved_on"].keys()
    assert about["seeds"]
    assert about["fitness"] > 0
    assert f"sink-evolve --config {name.partition('-')[0]} " in (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert sum(path.stat().st_size for path in (SHIPPED / name).iterdir()) < 30_000


@pytest.mark.parametrize("name", shipped())
def test_it_forgets_some_tokens_of_any_model(name):
    model = model_of("llama")
    config, parameters = read_artefact(name)
    memory = make_memory("namm", model, artefact=name)
    assert isinstance(memory, NAMM)
    assert torch.equal(memory.parameters, parameters)
    with torch.inference_mode():
        model(torch.tensor([tokens(2 * config.interval)]), past_key_values=memory)
    assert memory.bytes_kept < memory.bytes_held
