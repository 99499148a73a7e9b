"""Guards: the shapes that the names promise, Pythia's initialisation, and twins that start equal."""

from __future__ import annotations

import math

import pytest
import torch
import yaml

from recipes.config import find_config
from sinkmodel.errors import UserError
from sinkmodel.models import build_model, count_parameters
from sinkmodel.shapes import ModelShape
from sinkmodel.sinks import padded_vocabulary


def shape_of(name: str) -> ModelShape:
    return ModelShape(**yaml.safe_load(find_config(name).read_text())["model"])


@pytest.fixture(scope="module")
def pythia():
    return build_model(shape_of("pythia-160m"), padded_vocabulary(50_277), seed=1)


def test_pythia_160m_has_exactly_its_parameters(pythia):
    assert count_parameters(pythia) == (162_322_944, 85_056_000)
    config = pythia.config
    assert config.vocab_size == 50_304
    assert (config.use_parallel_residual, config.layer_norm_eps, config.hidden_act) == (True, 1e-5, "gelu")
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    assert pythia.gpt_neox.rotary_emb.inv_freq.numel() == 8, "16 of each head's 64 dimensions are rotated"


def test_llama_160m_has_exactly_its_parameters():
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        from sinkmodel.models import transformers_config

        model = AutoModelForCausalLM.from_config(transformers_config(shape_of("llama-160m"), 50_304))
    assert count_parameters(model) == (159_861_504, 82_594_560)


def test_pythias_initialisation_of_each_kind_of_weight(pythia):
    """small_init 0.02282, wang_init 0.00601; each std is estimated from ≥ 589,824 numbers, so 1 % is over 10 sigma."""
    small, wang = math.sqrt(2 / (5 * 768)), 2 / 12 / math.sqrt(768)
    assert (round(small, 5), round(wang, 5)) == (0.02282, 0.00601)
    kinds = {
        "gpt_neox.embed_in.weight": small,
        "attention.query_key_value.weight": small,
        "attention.dense.weight": wang,
        "mlp.dense_h_to_4h.weight": small,
        "mlp.dense_4h_to_h.weight": wang,
        "lm_head.weight": small,
    }
    seen = set()
    for name, parameter in pythia.named_parameters():
        if parameter.ndim == 1:
            assert torch.all(parameter == (0.0 if name.endswith("bias") else 1.0)), name
            continue
        kind = next(kind for kind in kinds if name.endswith(kind))
        seen.add(kind)
        assert parameter.std().item() == pytest.approx(kinds[kind], rel=0.01), name
        assert abs(parameter.mean().item()) < 0.01 * kinds[kind] + 1e-4, name
    assert seen == set(kinds)


def test_twins_start_from_identical_weights_sink_row_included():
    shape = ModelShape(layers=2, hidden=32, heads=4, kv_heads=4, ffn=64)
    a, b, other = build_model(shape, 256, 5), build_model(shape, 256, 5), build_model(shape, 256, 6)
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values()):
        assert torch.equal(x, y), name
    assert not torch.equal(a.gpt_neox.embed_in.weight, other.gpt_neox.embed_in.weight)


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"architecture": "gpt2"}, "architecture"),
        ({"hidden": 100, "heads": 12}, "hidden"),
        ({"kv_heads": 5}, "heads"),
        ({"kv_heads": 4}, "kv_heads"),
        ({"layers": 0}, "layers"),
        ({"architecture": "llama"}, "rotary_pct"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_its_key(wrong, key):
    with pytest.raises(UserError, match=f"model.{key}"):
        ModelShape(**wrong)
