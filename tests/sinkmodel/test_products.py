"""Guards: products through oneDNN are PyTorch's, forward and backward, and nothing goes there that should not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from sinkmodel import products
from sinkmodel.cache import StreamingCache
from sinkmodel.errors import UserError
from sinkmodel.products import ONEDNN, TORCH, fast_products, matmul
from sinkmodel.scoring import streaming_nll
from tests.models import build


@pytest.fixture
def taken(monkeypatch):
    """The shapes of all products that oneDNN computes; small ones too."""
    shapes, times = [], products._times
    products.usable()  # which computes some products of its own, once in a process

    def noted(x_MK, weight_NK, bias_N=None):
        shapes.append((*x_MK.shape, len(weight_NK)))
        return times(x_MK, weight_NK, bias_N)

    monkeypatch.setattr(products, "_times", noted)
    monkeypatch.setattr(products, "WORK", 1)
    return shapes


def test_the_operator_of_torch_is_there_and_right():
    """Risk: a new torch without the private operator, or with another one of its name: every gain is gone unseen."""
    assert products.usable()
    arguments = [argument.name for argument in torch.ops.mkldnn._linear_pointwise.default._schema.arguments]
    assert arguments == ["X", "W", "B", "attr", "scalars", "algorithm"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(40,), (4, 10), (2, 4, 5)])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 72), (72, 24), (48, 48)])
def test_a_linear_layer_is_that_of_torch_with_all_gradients(taken, rows, inputs, outputs, bias):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(inputs, outputs, bias=bias), torch.randn(*rows, inputs, requires_grad=True)
    wanted = [x, *layer.parameters()]
    grad = torch.randn(*rows, outputs)
    plain = layer(x)
    with fast_products(ONEDNN):
        ours = layer(x)
    assert torch.allclose(ours, plain, atol=1e-5, rtol=0)
    for got, want in zip(torch.autograd.grad(ours, wanted, grad), torch.autograd.grad(plain, wanted, grad)):
        assert torch.allclose(got, want, atol=1e-5, rtol=1e-5)
        assert got.is_contiguous()
        assert got.shape == want.shape
    assert sorted(taken) == sorted([(40, inputs, outputs), (40, outputs, inputs), taken[-1]])
    assert len(taken) == 3


@pytest.mark.parametrize("rows", [16, 600])
def test_operands_of_any_layout(rows, taken):
    """Risk: an operator that reads a view as if it were dense."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 64)[:, ::2], torch.randn(32, 1024).t()  # rows of the view lie 1,024 numbers apart
    narrow = torch.randn(64, 64)[:, 16:48]
    with fast_products(ONEDNN):
        assert torch.allclose(F.linear(x, weight), x @ weight.t(), atol=1e-4)
        assert torch.allclose(F.linear(x, narrow), x @ narrow.t(), atol=1e-4)
        assert torch.allclose(matmul(x, weight.t()), x @ weight.t(), atol=1e-4)
        assert torch.allclose(matmul(x.t(), x), x.t() @ x, atol=1e-4)
        layer = torch.nn.Linear(32, 24)
        layer(x).sum().backward()  # a gradient of one number, expanded
    got = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(x).sum().backward()
    assert torch.allclose(got, layer.weight.grad, atol=1e-4)
    assert len(taken) == 6


def test_what_is_frozen_costs_no_product_and_keeps_no_input(taken):
    """Risk: a run of the sink's row alone pays for gradients of all weights, and for the activations that they need."""
    layer = torch.nn.Linear(24, 40).requires_grad_(False)
    x, kept = torch.randn(32, 24, requires_grad=True), []
    with fast_products(ONEDNN), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    y.sum().backward()
    assert taken == [(32, 24, 40), (32, 40, 24)]
    assert [t.shape for t in kept] == [layer.weight.shape]
    taken.clear()
    with fast_products(ONEDNN):
        assert not layer(x.detach()).requires_grad
    assert taken == [(32, 24, 40)]


def test_what_stays_with_torch(taken, monkeypatch):
    """Risk: a decoding step, half precision, or a model outside of the block goes through oneDNN."""
    layer, x = torch.nn.Linear(24, 24), torch.randn(32, 24)
    with fast_products(ONEDNN):
        layer(x[:15])
        layer.double()(x.double())
        layer.bfloat16()(x.bfloat16())
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        with fast_products(TORCH):
            layer(x)
        F.linear(x.to("meta"), layer.weight.to("meta"))
    with fast_products(ONEDNN, rows=1):
        layer(x)
    layer(x)
    products.linear(x, layer.weight)
    matmul(x, layer.weight)
    assert taken == []
    monkeypatch.setattr(products, "WORK", 32 * 24 * 24 + 1)
    with fast_products(ONEDNN):
        layer(x)
    assert taken == []


def test_the_switch(taken, monkeypatch):
    """Risk: nobody can turn it off; or an enclosing choice, as that of a run, is measured away by what it calls."""
    layer, x = torch.nn.Linear(24, 24), torch.randn(32, 24)
    monkeypatch.setattr(products, "_faster", lambda backward: pytest.fail("measured, though it is decided"))
    for switch, expected in (("torch", 0), ("onednn", 1)):
        monkeypatch.setenv(products.SWITCH, switch)
        taken.clear()
        with fast_products():
            layer(x)
        assert len(taken) == expected
        with fast_products(TORCH), fast_products():
            layer(x)
        assert len(taken) == expected
    monkeypatch.setenv(products.SWITCH, "auto")
    with fast_products():
        layer(x[:8])  # nothing large: nothing is measured
    for faster, expected in ((TORCH, 0), (ONEDNN, 1)):
        monkeypatch.setattr(products, "_faster", lambda backward, faster=faster: faster)
        taken.clear()
        with fast_products():
            layer(x)
        assert len(taken) == expected
    monkeypatch.setenv(products.SWITCH, "mkl")
    with pytest.raises(
        UserError, match="SINKMODEL_PRODUCTS is 'mkl' in the environment; set it to auto, torch or onednn"
    ):
        products.library()


def test_scoring_has_a_choice_of_its_own(taken, monkeypatch):
    """Risk: oneDNN's slow gradient of a weight decides for products that have no gradient."""
    layer, x = torch.nn.Linear(24, 24), torch.randn(32, 24)
    monkeypatch.setenv(products.SWITCH, "auto")
    monkeypatch.setattr(products, "_faster", lambda backward: TORCH if backward else ONEDNN)
    with fast_products():
        layer(x)
        assert not taken
        with torch.no_grad():
            layer(x)
        assert len(taken) == 1
    assert products.library() == TORCH


def test_what_was_used_is_known_and_nothing_is_measured_for_it(taken, monkeypatch):
    """Risk: a result names a library that its numbers did not go through, or is lost since the choice is refused."""
    layer, x = torch.nn.Linear(24, 24), torch.randn(32, 24)
    monkeypatch.setattr(products, "_USED", set())
    monkeypatch.setattr(products, "_faster", lambda backward: pytest.fail("measured"))
    layer(x)
    with fast_products(ONEDNN):
        layer(x[:8])
    monkeypatch.setenv(products.SWITCH, "mkl")
    assert products.used() == TORCH
    with fast_products(ONEDNN):
        layer(x)
    assert products.used() == ONEDNN


def test_without_a_sound_operator_torch_computes(monkeypatch):
    """Risk: an operator that gives other numbers, or none, is used."""
    monkeypatch.setenv(products.SWITCH, "auto")
    times = products._times
    for broken in (lambda *args: times(*args) + 1e-2, lambda *args: torch.ops.mkldnn.gone(*args)):
        monkeypatch.setattr(products, "_times", broken)
        for cached in (products.usable, products._faster):
            cached.cache_clear()
        assert not products.usable()
        assert products.library() == TORCH
        monkeypatch.setenv(products.SWITCH, "onednn")
        with pytest.raises(
            UserError, match="SINKMODEL_PRODUCTS is onednn, but this build of torch has no such product"
        ):
            products.asked()
        monkeypatch.setenv(products.SWITCH, "auto")
    monkeypatch.undo()
    for cached in (products.usable, products._faster):
        cached.cache_clear()


def test_measuring_leaves_random_numbers_and_threads_alone():
    """Risk: whether a machine was measured decides what a run draws."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    products._faster.cache_clear()
    with torch.inference_mode():
        assert {products._faster(backward) for backward in (True, False)} <= {TORCH, ONEDNN}
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_scoring_and_a_prompt_go_through_it_and_decoding_does_not(taken, monkeypatch):
    """Risk: the block is lost when a model is scored, or costs every step; the model is not what it was."""
    model = build("llama").eval()
    before = copy.deepcopy(model.state_dict())
    ids = torch.randint(0, model.config.vocab_size, (1, 64))
    plain = streaming_nll(model, ids.tolist(), 32, 1)[0]
    assert taken == []
    monkeypatch.setenv(products.SWITCH, "onednn")
    assert torch.allclose(streaming_nll(model, ids.tolist(), 32, 1)[0], plain, atol=1e-5)
    linears = sum(type(module) is torch.nn.Linear for module in model.modules())
    assert len(taken) == linears
    taken.clear()
    cache = StreamingCache(model.config, budget=32, sinks=1)
    with torch.inference_mode():
        model(ids[:, :24], past_key_values=cache)
        assert len(taken) == linears
        model(ids[:, 24:25], past_key_values=cache)
        assert len(taken) == linears
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_compiled_model_computes_its_own_products():
    """Risk: the block breaks a compiled model into pieces, or fails in it."""
    layer, x = (
        torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.GELU(), torch.nn.Linear(24, 8)),
        torch.randn(32, 24),
    )
    graphs = []
    compiled = torch.compile(layer, backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)
    with fast_products(ONEDNN):
        assert torch.allclose(compiled(x), layer(x), atol=1e-5)
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"].count(F.linear) == 2
