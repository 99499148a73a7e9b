"""Guards: a turned key is the key at the other position, in every layout, far out too, and what is none is refused."""

from __future__ import annotations

import pytest
import torch

from sinkmodel.errors import UserError
from sinkmodel.probe import rotary_of
from tests.models import build, model_of, tokens
from tests.reference import rotated

SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def layouts():
    yield pytest.param(lambda: model_of("gpt_neox"), id="partial")
    for name, rope in SCALINGS.items():
        yield pytest.param(lambda rope=rope: build("llama", rope_parameters=rope), id=name)


@pytest.mark.parametrize("make", layouts())
@pytest.mark.parametrize("start", [0, 9, 4_000_000])
def test_a_turn_is_a_difference_of_positions(make, start):
    model = make()
    raw = torch.randn(5, 4, 8, dtype=torch.float64)  # [places, heads, D]
    here, there = torch.arange(start, start + 5), torch.tensor([0, 1, 7, 50, 51])
    turned = rotary_of(model).turn(rotated(model, raw, here).transpose(0, 1)[None], there - here)
    expected = rotated(model, raw, there).transpose(0, 1)[None]
    torch.testing.assert_close(turned, expected, atol=1e-6, rtol=1e-6, check_dtype=True)
    assert (turned - rotated(model, raw, there + 1).transpose(0, 1)[None]).abs().max() > 0.1


def test_no_turn_and_the_way_back_and_the_dimensions_that_pass():
    rotary, x = rotary_of(model_of("gpt_neox")), torch.randn(2, 3, 5, 8)
    assert torch.equal(rotary.turn(x, 0), x)
    torch.testing.assert_close(rotary.turn(rotary.turn(x, 1234), -1234), x)
    assert torch.equal(rotary.turn(x, 1234)[..., 2:], x[..., 2:])  # a quarter of 8 dimensions is rotated
    assert not torch.equal(rotary.turn(x, 1234)[..., :2], x[..., :2])
    assert rotary.turn(x.bfloat16(), 3).dtype == torch.bfloat16


def test_another_number_of_rotary_dimensions_is_noticed():
    """Guards the trial turn: it must not pass a model whose frequencies are not those of its keys."""
    model = build("llama")
    model.model.rotary_emb.register_forward_hook(lambda _, __, out: (out[1], out[0]))
    with pytest.raises(UserError, match="rotates the keys of layer 0"):
        rotary_of(model)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rope_whose_frequencies_depend_on_length_says_up_to_where(kind):
    half = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **(half if kind == "longrope" else {})}
    model = build("llama", rope_parameters=rope)
    rotary = rotary_of(model)
    assert rotary.limit == (32 if kind == "longrope" else 63)
    with torch.no_grad():
        model(torch.tensor([tokens(80)]))  # after a long text the frequencies are others
    assert torch.equal(rotary_of(model).inv_freq, rotary.inv_freq)


@pytest.mark.parametrize("layout", ["cohere", "gptj"])
def test_interleaved_pairs_are_found(layout):
    assert rotary_of(build(layout)).interleaved
    assert not rotary_of(build("llama")).interleaved


def test_layers_without_positions_are_found():
    assert rotary_of(build("SmolLM3", num_key_value_heads=2, no_rope_layers=[1, 0])).layers == (True, False)


def test_another_kind_of_scaling_is_refused():
    model = build("llama")
    model.model.rotary_emb.rope_type = "spiral"
    with pytest.raises(UserError, match="'llama' has rotary scaling 'spiral'"):
        rotary_of(model)


def test_damaged_weights_are_not_called_another_layout():
    model = build("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="keys that are not finite; its weights are damaged"):
        rotary_of(model)
