"""Guards: attention without a mask is the same attention, and no mask is built for it, compiled or not."""

from __future__ import annotations

import pytest
import torch

from sinkmodel.attention import CAUSAL
from sinkmodel.models import build_model
from tests import tiny


@pytest.mark.parametrize("architecture", tiny.SHAPES)
def test_it_is_the_models_own_causal_attention(architecture):
    model = build_model(tiny.SHAPES[architecture], 384, seed=1)
    ids = torch.randint(0, 300, (2, 40))
    logits, gradients = {}, {}
    for name in ("eager", "sdpa", CAUSAL):
        model.set_attn_implementation(name)
        model.zero_grad()
        logits[name] = model(input_ids=ids, use_cache=False).logits
        logits[name].logsumexp(-1).sum().backward()
        gradients[name] = model.get_input_embeddings().weight.grad.clone()
    assert (logits[CAUSAL] - logits["eager"]).abs().max() < 1e-5
    assert torch.equal(logits[CAUSAL], logits["sdpa"])
    assert (gradients[CAUSAL] - gradients["eager"]).abs().max() < 1e-4
    assert gradients["eager"].abs().max() > 1e-2


def test_the_compiled_graph_has_no_mask():
    """With `sdpa` the traced forward builds one; with ours the kernel is told that it is causal."""
    model = build_model(tiny.SHAPES["gpt_neox"], 384, seed=1)
    ids = torch.randint(0, 300, (2, 40))

    def kernels_with_a_mask(name: str) -> list[bool]:
        found = []

        def look(graph: torch.fx.GraphModule, inputs):
            for node in graph.graph.nodes:
                if node.target is torch.nn.functional.scaled_dot_product_attention:
                    found.append(node.kwargs.get("attn_mask") is not None)
            return graph.forward

        torch.compiler.reset()
        model.set_attn_implementation(name)
        torch.compile(model.base_model, backend=look)(input_ids=ids, use_cache=False)
        return found

    assert kernels_with_a_mask("sdpa") == [True, True], "the trap that this function is for; if it has gone, so may we"
    assert kernels_with_a_mask(CAUSAL) == [False, False]


def test_a_mask_is_refused():
    model = build_model(tiny.SHAPES["gpt_neox"], 384, seed=1)
    model.set_attn_implementation(CAUSAL)
    with pytest.raises(ValueError, match="takes no mask"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), attention_mask=torch.zeros(1, 1, 4, 4))
