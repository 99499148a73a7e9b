"""Guards: whatever name a base is given by, training starts from the same model, and the run names it so that it is
found again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sinkmodel.checkpoint import Recipe, checkpoint_steps, read_checkpoint
from sinkmodel.export.folder import export
from sinkmodel.export.gguf_file import export_gguf
from sinkmodel.loading import load_model
from sinkmodel.sinks import SinkConfig
from tests import tiny
from tests.hub import hub, upload
from tests.recipes.test_start_from import losses, train, weights

__all__ = ["hub"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One vanilla Llama as a checkpoint, a GGUF file and a model folder."""
    place = tmp_path_factory.mktemp("made")
    checkpoint = tiny.checkpoint(place / "run", "llama", sink=SinkConfig("none"))
    return checkpoint, export_gguf(checkpoint, place / "model.gguf"), export(checkpoint, place / "folder")


@pytest.fixture(scope="module")
def expected(data, made, tmp_path_factory):
    """The run from the folder."""
    return train(data, made[2], tmp_path_factory.mktemp("runs") / "run", training__parts="sink", schedule__steps=2)


def package(site: Path, file: Path) -> str:
    """An installed package that ships a GGUF file."""
    about = site / "llm_tiny-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "llm_tiny").mkdir()
    (site / "llm_tiny" / "model.gguf").write_bytes(file.read_bytes())
    (about / "METADATA").write_text("Metadata-Version: 2.4\nName: llm-tiny\nVersion: 1.0\nLicense-Expression: MIT\n")
    (about / "RECORD").write_text("llm_tiny/model.gguf,,\nllm_tiny-1.0.dist-info/METADATA,,\n")
    return "llm-tiny"


@pytest.mark.parametrize("form", ["checkpoint", "gguf", "package", "hub"])
def test_every_name_starts_the_same_training(data, made, expected, tmp_path, monkeypatch, hub, form):
    """Risk: a name that `sink-eval` takes cannot be trained from, or its checkpoints cannot find the base again."""
    checkpoint, file, folder = made
    if form == "package":
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        name = package(tmp_path / "site", file)
    elif form == "hub":
        upload(hub, "org/base", folder)
        name = "org/base"
    else:
        name = str(checkpoint if form == "checkpoint" else file)
    run = train(data, name, tmp_path / "run", training__parts="sink", schedule__steps=2)
    assert losses(run) == pytest.approx(losses(expected), abs=1e-6)
    base = Recipe.from_dict(read_checkpoint(checkpoint_steps(run)[2])["recipe"]).base
    assert (base.name, base.license) == (name, "MIT" if form == "package" else None)
    loaded, other = load_model(str(run)), weights(expected)
    assert loaded.sink_ids == [300]
    assert all(torch.allclose(weight, other[key], atol=1e-6) for key, weight in loaded.model.state_dict().items())
