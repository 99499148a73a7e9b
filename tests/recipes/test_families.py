"""Guards: for every architecture that can be trained, loss and gradients of a step are those of transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recipes.data.rows import IGNORE
from recipes.training.loss import LossHead
from sinkmodel.attention import CAUSAL
from sinkmodel.trainable import check_trainable
from tests.models import IN_SOFTMAX, build, tokens

SHARED = {"num_key_value_heads": 2}
TRAINED = (  # keys of tables in tests/models.py, and families of transformers
    *("gpt_neox", "gpt_neox-serial", "llama", "llama-yarn", "llama-linear", "llama-llama3", "mistral", "qwen2"),
    *("qwen3", "gemma", "phi", "olmo", "smollm3", "stablelm", "cohere"),
    *("Olmo2", "Phi3", "Starcoder2", "Glm", "Granite", "Nemotron"),
)
T = 24


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [2, T]; some targets are not scored."""
    text_2T = torch.tensor([tokens(T + 1, seed=seed) for seed in (1, 2)])
    targets_2T = text_2T[:, 1:].clone()
    targets_2T[:, ::5] = IGNORE
    return text_2T[:, :-1], targets_2T


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", [*TRAINED, *IN_SOFTMAX])
def test_loss_and_gradients_of_a_step_are_those_of_plain_transformers(family, tied):
    """Risk: an embedding's scale, a head's bias, a window or a logit's scale is lost between body and head."""
    model = build(family, **(SHARED if family[0].isupper() else {}), tie_word_embeddings=tied)
    check_trainable(model, family, sequence=T)
    model.train()
    inputs_2T, targets_2T = rows()
    model.set_attn_implementation("eager")
    plain = F.cross_entropy(model(input_ids=inputs_2T).logits.flatten(0, 1), targets_2T.flatten(), ignore_index=IGNORE)
    expected = gradients(model, plain)
    model.set_attn_implementation(CAUSAL)
    model.set_output_embeddings(LossHead(model.get_output_embeddings(), chunk=11))
    hidden_2TD = model.base_model(input_ids=inputs_2T, use_cache=False).last_hidden_state
    loss, _ = model.get_output_embeddings()(hidden_2TD.flatten(0, 1), targets_2T.flatten())
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    got = gradients(model, loss)
    assert got.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() < 1e-5 * max(1.0, largest), name
    assert largest > 1e-2, "gradients of nothing would pass as well"


def test_the_bias_of_a_head_matters():
    """Guards the test above: Phi has one, and the loss without it is another."""
    head = build("phi").get_output_embeddings()
    assert head.bias.abs().max() > 0.1
