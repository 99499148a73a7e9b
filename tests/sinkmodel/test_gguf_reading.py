"""Guards: a GGUF file is parsed once and its table of names is built once, with the same weights, and nothing stays."""

from __future__ import annotations

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from sinkmodel.errors import UserError
from sinkmodel.export import main
from sinkmodel.gguf_reading import remembered
from sinkmodel.loading import load_model
from sinkmodel.models import build_model
from sinkmodel.sinks import SinkConfig, padded_vocabulary
from tests import tiny


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    place = tmp_path_factory.mktemp("gguf")
    tiny.checkpoint(place / "run", "llama", SinkConfig("token"))
    assert main(["--checkpoint", str(place / "run"), "--output", str(place / "m.gguf"), "--format", "gguf"]) == 0
    return place / "m.gguf"


@pytest.fixture
def counted(monkeypatch):
    """How often each of the two is made again."""
    count = {"readers": 0, "tables": 0}

    class Reader(gguf.GGUFReader):
        def __init__(self, *arguments):
            count["readers"] += 1
            super().__init__(*arguments)

    table = gguf.get_tensor_name_map

    def make_table(*arguments):
        count["tables"] += 1
        return table(*arguments)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    monkeypatch.setattr(gguf, "get_tensor_name_map", make_table)
    return count


def test_a_file_is_parsed_once_and_gives_the_same_weights(file, counted):
    """Risk: transformers imports the two in another way, and every command on a GGUF file takes three times as long."""
    loaded = load_model(str(file))
    assert counted == {"readers": 1, "tables": 1}
    plain = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert counted["readers"] > 2
    assert counted["tables"] > 10
    weights = loaded.model.state_dict()
    assert weights.keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(weights[name], tensor), name


def test_a_file_that_has_changed_is_read_again(file, tmp_path):
    """Risk: a second load of the same path gets the weights of the first."""
    path = tmp_path / "m.gguf"
    path.write_bytes(file.read_bytes())
    first = load_model(str(path)).model.get_input_embeddings().weight.clone()
    sink = SinkConfig("token")
    other = build_model(tiny.SHAPES["llama"], padded_vocabulary(tiny.tokenizer().vocabulary), 4, sink)
    tiny.checkpoint(tmp_path / "run", "llama", sink, model=other)
    path.unlink()
    assert main(["--checkpoint", str(tmp_path / "run"), "--output", str(path), "--format", "gguf"]) == 0
    assert not torch.equal(load_model(str(path)).model.get_input_embeddings().weight, first)


def test_what_was_put_in_place_is_taken_away_after_an_error(file, tmp_path):
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    damaged = tmp_path / "m.gguf"
    damaged.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError):
        load_model(str(damaged))
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    with remembered():
        assert (gguf.GGUFReader, gguf.get_tensor_name_map) != before
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
