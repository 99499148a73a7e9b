"""Guards: attention without a mask is the same attention; a sink in the softmax is one more column of it, no more."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from sinkmodel.attention import CAUSAL, causal_attention
from sinkmodel.errors import UserError
from sinkmodel.models import build_model
from sinkmodel.softmax_sinks import attention
from sinkmodel.softmax_sinks.attention import attend, sink_attention_forward
from tests import tiny
from tests.models import build, tokens

B, H, D, SCALE = 2, 4, 8, 0.4
LENGTHS = [
    (1, 1),
    (1, 9),
    (9, 9),
    (5, 9),
    (150, 150),
]  # T queries and K keys; the last are more than a block of the kernel


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
    """With `sdpa` the traced forward builds one; with ours the kernel gets `is_causal`."""
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


ASKED = {  # what architectures pass to their attention, and whether it may pass
    "sliding_window": ((None, 12, 40), (11, 1)),
    "softcap": ((None,), (50.0, torch.tensor(30.0))),
    "s_aux": ((None,), (torch.zeros(H),)),
    "position_bias": ((None,), (torch.zeros(1, H, 12, 12),)),
    "indices": ((None, False), (torch.zeros(B, 12, 4),)),
    "position_ids": ((None, torch.arange(12)[None]), ()),
    "is_causal": ((None, True), ()),
    "output_attentions": ((None, False, True), ()),
}


@pytest.mark.parametrize("name", ASKED)
def test_causal_attention_ignores_no_request_of_an_architecture(name):
    """Risk: a model with a window, soft-capping or sinks of its own is trained as another model, without a word."""
    module = SimpleNamespace(config=SimpleNamespace(model_type="gemma2"), is_causal=True)
    q, k, v = (torch.randn(B, H, 12, D, generator=torch.Generator().manual_seed(i)) for i in range(3))
    plain, _ = causal_attention(module, q, k, v, None, scaling=SCALE)
    harmless, asked = ASKED[name]
    for x in harmless:
        assert torch.equal(causal_attention(module, q, k, v, None, scaling=SCALE, **{name: x})[0], plain)
    for x in asked:
        with pytest.raises(UserError, match=f"gemma2.*{name.replace('_', '.')}.*;"):
            causal_attention(module, q, k, v, None, scaling=SCALE, **{name: x})


def test_causal_attention_is_for_decoders_and_keeps_scale_and_dropout():
    """Risk: an encoder's tokens are cut off from those after them; a model's own scale or dropout is lost."""
    module = SimpleNamespace(config=SimpleNamespace(model_type="bert"), is_causal=False)
    q, k, v = (torch.randn(B, H, 12, D, generator=torch.Generator().manual_seed(i)) for i in range(3))
    with pytest.raises(UserError, match="bert.*keys after the query"):
        causal_attention(module, q, k, v, None)
    module.is_causal = True
    expected = written_out(q, k, v, torch.full((B, H, 12), -torch.inf), lower(12, 12), 0.7).transpose(1, 2)
    torch.testing.assert_close(
        causal_attention(module, q, k, v, None, scaling=0.7)[0].double(), expected, atol=1e-5, rtol=0
    )
    ones = torch.ones_like(v)
    assert (causal_attention(module, q, k, ones, None, dropout=0.5)[0] - 1).abs().max() > 0.1


def test_with_a_window_as_wide_as_the_row_the_body_compiles_to_one_graph():
    """Risk: looking at what is asked for breaks the graph of a compiled body, and with it the speed of training."""
    model = build("mistral", sliding_window=40)
    model.set_attn_implementation(CAUSAL)
    ids = torch.tensor([tokens(40)])
    expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    torch.compiler.reset()
    compiled = torch.compile(model.base_model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).last_hidden_state, expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="mistral.*window of 40,.*at most 40"):
        model.base_model(input_ids=torch.tensor([tokens(41)]), use_cache=False)


# --------------------------------------------------------------------------------------------- a sink in the softmax


def written_out(q, k, v, score_BHT, seen_TK, scale=SCALE):
    """softmax over the sink's score and the keys', in fp64; the sink's value is zero."""
    q, k, v, score_BHT = (x.double() for x in (q, k, v, score_BHT))
    scores_BHTK = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen_TK, float("-inf"))
    weights = torch.softmax(torch.cat([score_BHT[..., None], scores_BHTK], dim=-1), dim=-1)
    return weights[..., 1:] @ v


def drawn(T: int, K: int, dtype=torch.float32) -> list[torch.Tensor]:
    """q, k, v, and scores of the sink that take between nothing and all of the attention."""
    generator = torch.Generator().manual_seed(T + K)
    shapes = (B, H, T, D), (B, H, K, D), (B, H, K, D), (B, H, T)
    q, k, v, score = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.requires_grad_() for x in (q.to(dtype), k.to(dtype), v.to(dtype), 4 * score)]


def lower(T: int, K: int) -> torch.Tensor:
    """What PyTorch means by causal: from the first key on; one query sees all."""
    return torch.ones(T, K, dtype=torch.bool).tril() if T > 1 else torch.ones(T, K, dtype=torch.bool)


def assert_same(function, inputs, seen, rounding: float = 2e-6) -> None:
    """Values, and the gradients of q, k, v and the score."""
    y, expected = function(*inputs), written_out(*inputs, seen)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(y, inputs, upstream.to(y.dtype))
    theirs = torch.autograd.grad(expected, inputs, upstream.double())
    for name, a, b in zip(("y", "q", "k", "v", "score"), (y, *ours), (expected, *theirs)):
        assert (a - b).abs().max() < rounding * max(1.0, b.abs().max().item()), name
        assert b.abs().max() > 1e-2 or name == "q", name  # one key only: q is of no matter


@pytest.mark.parametrize(("T", "K"), LENGTHS)
@pytest.mark.parametrize("way", ["kernel", "column"])
def test_a_sink_is_one_more_column_of_the_softmax(T, K, way, monkeypatch):
    if way == "column":
        monkeypatch.setattr(attention, "_has_kernel", lambda q, v: False)
    assert_same(lambda q, k, v, s: attend(q, k, v, s, None, SCALE), drawn(T, K), lower(T, K))


def test_rows_of_training_and_steps_of_decoding_go_through_the_fused_kernel(monkeypatch):
    """Guards the speed: no mask of T × T, no copy of keys and values, if none is needed."""
    calls = []
    monkeypatch.setattr(attention, "_with_column", lambda *inputs: calls.append(inputs[0].shape[2]) or inputs[0])
    for T, K in LENGTHS:
        attend(*drawn(T, K), None, SCALE)
    assert calls == [5]


def test_gradients_are_those_of_finite_differences():
    inputs = [x[:1, :2].detach().double().requires_grad_() for x in drawn(5, 5)]
    assert torch.autograd.gradcheck(lambda *x: attend(*x, None, SCALE), inputs)


@pytest.mark.parametrize("form", ["boolean", "additive", "additive, a head each"])
@pytest.mark.parametrize(("T", "K"), LENGTHS)
def test_masks_hide_keys_and_never_the_sink(T, K, form):
    seen = (
        torch.rand(B, 1 if form != "additive, a head each" else H, T, K, generator=torch.Generator().manual_seed(3))
        < 0.6
    )
    seen[0, :, 0] = False  # a query that sees nothing but the sink, as a pad does
    seen[1, :, :, 0] = True
    mask = seen if form == "boolean" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    inputs = drawn(T, K)
    assert_same(lambda q, k, v, s: attend(q, k, v, s, mask, SCALE), inputs, seen)
    assert attend(*inputs, mask, SCALE)[0, :, 0].abs().max() < 1e-30


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 1e-12)])
def test_other_precisions_round_once(dtype, rounding):
    assert_same(lambda q, k, v, s: attend(q, k, v, s, None, SCALE), drawn(40, 40, dtype), lower(40, 40), rounding)


@pytest.mark.parametrize("masked", [False, True])
def test_under_autocast_it_computes_in_bf16_whatever_it_is_given(masked):
    """Guards mixed precision: RoPE gives queries and keys in fp32, the projection values in bf16."""
    inputs, mask = drawn(40, 40), lower(40, 40) if masked else None
    inputs[2] = inputs[2].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(*inputs, mask, SCALE).dtype == torch.bfloat16
        assert_same(lambda q, k, v, s: attend(q, k, v, s, mask, SCALE), inputs, lower(40, 40), 3e-2)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_it_is_one_graph_with_the_same_numbers(masked, autocast):
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    mask = lower(20, 20) if masked else None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_same(
            lambda q, k, v, s: compiled(q, k, v, s, mask, SCALE),
            drawn(20, 20),
            lower(20, 20),
            3e-2 if autocast else 2e-6,
        )


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_it_is_flex_attention_renormalised():
    """Code that we did not write: y of PyTorch's own softmax, with its lse, is scaled by hand."""
    q, k, v, score = (x.detach() for x in drawn(9, 9))
    out, aux = flex_attention(
        q,
        k,
        v,
        scale=SCALE,
        score_mod=lambda s, b, h, i, j: torch.where(i >= j, s, -torch.inf),
        return_aux=AuxRequest(lse=True),
    )
    expected = out / (1 + (score - aux.lse).exp())[..., None]
    torch.testing.assert_close(attend(q, k, v, score, None, SCALE), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("function", [causal_attention, sink_attention_forward])
@pytest.mark.parametrize("kind", ["zero", "logit", "kv_bias"])
@pytest.mark.parametrize("groups", [1, 2, H])
def test_each_kind_has_its_score_and_heads_share_keys(kind, groups, function):
    """A learned key belongs to a KV head, a learned number to a head; its gradient comes back in the same shape."""
    q, k, v, _ = drawn(12, 12)
    k, v = (x[:, :groups].detach().requires_grad_() for x in (k, v))
    sink = torch.randn((H,) if kind == "logit" else (groups, D), requires_grad=True)
    module = SimpleNamespace(config=SimpleNamespace(sink={"kind": kind}), sink=sink)
    shared = [h * groups // H for h in range(H)]  # the KV head of each head
    per_head = (
        torch.stack([(q[:, h] * sink[g]).sum(-1) * SCALE for h, g in enumerate(shared)], dim=1)
        if kind == "kv_bias"
        else None
    )
    score = {"zero": torch.zeros(B, H, 12), "logit": sink[:, None].expand(B, -1, 12) if kind == "logit" else None}.get(
        kind, per_head
    )
    y, weights = function(module, q, k, v, None, scaling=SCALE)
    assert weights is None
    expected = written_out(q, k[:, shared], v[:, shared], score, lower(12, 12)).transpose(1, 2)
    torch.testing.assert_close(y.double(), expected, atol=2e-6, rtol=0)
    wanted = [q, k, v, *([] if kind == "zero" else [sink])]
    for ours, theirs in zip(*(torch.autograd.grad(x.square().sum(), wanted) for x in (y, expected))):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max() + 1e-5


def test_what_would_lose_the_sink_is_refused():
    q, k, v, _ = drawn(3, 3)
    for config in (SimpleNamespace(), SimpleNamespace(sink={"kind": "token"})):
        with pytest.raises(ValueError, match="has no sink in its softmax"):
            sink_attention_forward(SimpleNamespace(config=config), q, k, v, None)
    module = SimpleNamespace(config=SimpleNamespace(sink={"kind": "zero"}))
    with pytest.raises(ValueError, match="has no dropout"):
        sink_attention_forward(module, q, k, v, None, dropout=0.1)
    with pytest.raises(ValueError, match="takes no mask"):
        causal_attention(module, q, k, v, lower(3, 3)[None, None])
