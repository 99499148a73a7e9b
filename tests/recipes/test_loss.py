"""Guards: the chunked loss is the plain one, in value and gradients, and never holds the whole logits.

What is frozen costs nothing; a few rows of the head can be trained on a frozen one.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recipes.data.rows import IGNORE
from recipes.training.loss import LossHead, chunked_cross_entropy, scaled_softmax


def problem(places=50, hidden=16, words=301, seed=0):
    torch.manual_seed(seed)
    hidden_ND = torch.randn(places, hidden, requires_grad=True)
    head_VD = (torch.randn(words, hidden) * 0.3).requires_grad_()
    targets_N = torch.randint(0, words, (places,))
    targets_N[::7] = IGNORE
    return hidden_ND, head_VD, targets_N


@pytest.mark.parametrize("chunk", [1, 8, 13, 50, 1000])
def test_value_and_gradients_equal_the_plain_loss(chunk):
    hidden, head, targets = problem()
    plain = F.cross_entropy(hidden @ head.T, targets, ignore_index=IGNORE)
    want = torch.autograd.grad(plain * 0.25, [hidden, head])
    loss, nll = chunked_cross_entropy(hidden, head, targets, chunk)
    got = torch.autograd.grad(loss * 0.25, [hidden, head])
    assert abs(loss.item() - plain.item()) < 1e-5
    for a, b in zip(got, want):
        assert (a - b).abs().max() < 1e-5
        assert b.abs().max() > 1e-3, "gradients of nothing would pass as well"
    each = F.cross_entropy(hidden @ head.T, targets, ignore_index=IGNORE, reduction="none")
    assert (nll - each).abs().max() < 1e-5


def test_no_tensor_of_the_size_of_all_logits_is_made():
    hidden, head, targets = problem(places=256, words=500)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in [result] if isinstance(result, torch.Tensor) else []:
                Largest.seen = max(Largest.seen, tensor.numel())
            return result

    with Largest():
        loss, _ = chunked_cross_entropy(hidden, head, targets, 32)
        loss.backward()
    assert 32 * 500 <= Largest.seen < 256 * 500


def test_bf16_autocast_stays_close_and_keeps_fp32_gradients():
    hidden, head, targets = problem()
    plain = F.cross_entropy(hidden @ head.T, targets, ignore_index=IGNORE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = chunked_cross_entropy(hidden, head, targets, 16)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - plain.item()) < 2e-2
    assert head.grad.dtype == torch.float32


def test_gradients_are_not_computed_where_nobody_asks():
    hidden, head, targets = problem()

    class Scatters(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Scatters.count += "scatter_add" in str(function)
            return function(*args, **(kwargs or {}))

    with Scatters():
        with torch.no_grad():
            loss, _ = chunked_cross_entropy(hidden, head, targets, 16)
        assert not loss.requires_grad
        assert Scatters.count == 0
        chunked_cross_entropy(hidden, head, targets, 16)
        assert Scatters.count == 4, "one per chunk, if they are wanted"


# --------------------------------------------------------------------------------------- a bias, and rows of their own


INPUTS = ("hidden", "head", "bias", "rows")
FIRST, ROWS = 298, 3  # the last of 301


def inputs(wanted: tuple[str, ...], dtype=torch.float32, places=50) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """hidden [N, D], head [V, D], bias [V] and rows [S, D], of which `wanted` need gradients; and targets."""
    hidden, head, targets = problem(places)
    targets[1::5] = FIRST + torch.arange(len(targets[1::5])) % ROWS  # some rows are targets
    made = {"hidden": hidden, "head": head, "bias": torch.randn(301), "rows": torch.randn(ROWS, 16) * 0.3}
    return {key: x.detach().to(dtype).requires_grad_(key in wanted) for key, x in made.items()}, targets


def plainly(x: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """F.cross_entropy with the rows put into a copy of the head."""
    head = torch.cat([x["head"][:FIRST], x["rows"], x["head"][FIRST + ROWS :]]) if "rows" in x else x["head"]
    return F.cross_entropy(F.linear(x["hidden"], head, x.get("bias")), targets, ignore_index=IGNORE)


def chunked(x: dict[str, torch.Tensor], targets: torch.Tensor, chunk: int = 13) -> torch.Tensor:
    return chunked_cross_entropy(
        x["hidden"],
        x["head"],
        targets,
        chunk,
        scaled_softmax,
        x.get("bias"),
        x.get("rows"),
        FIRST if "rows" in x else 0,
    )[0]


@pytest.mark.parametrize("given", [INPUTS, INPUTS[:3], ("hidden", "head", "rows")], ids=", ".join)
@pytest.mark.parametrize(
    "wanted", [INPUTS, ("hidden", "rows"), ("rows",), ("hidden", "bias"), ("head",)], ids=", ".join
)
def test_bias_and_rows_give_the_loss_and_gradients_of_a_head_that_has_them(given, wanted):
    """Risk: a frozen part changes the gradients of the others; a stale row keeps a part in the hidden gradient."""
    made, targets = inputs(wanted)
    x = {key: made[key] for key in given}
    asked = [x[key] for key in given if key in wanted]
    if not asked:
        assert not chunked(x, targets).requires_grad
        return
    want = torch.autograd.grad(plainly(x, targets) * 0.25, asked)
    loss = chunked(x, targets)
    assert abs(loss - plainly(x, targets)) < 1e-5
    for a, b in zip(torch.autograd.grad(loss * 0.25, asked), want):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 1e-6
        assert b.abs().max() > 1e-3


@pytest.mark.parametrize("wanted", [INPUTS, ("hidden", "rows"), ("rows",)], ids=", ".join)
def test_gradients_are_those_of_finite_differences(wanted):
    """Risk: fp64 is rounded to fp32 on the way, and a gradient that is off by 1e-4 passes."""
    made, targets = inputs(wanted, torch.float64, places=7)
    asked = [made[key] for key in wanted]
    assert torch.autograd.gradcheck(lambda *x: chunked({**made, **dict(zip(wanted, x))}, targets, 3), asked)
    assert chunked(made, targets).dtype == torch.float64
    assert torch.allclose(chunked(made, targets), plainly(made, targets), rtol=1e-14)


class Work(torch.utils._python_dispatch.TorchDispatchMode):
    """How many matrix products run, and the shapes of the tensors that are made."""

    def __init__(self):
        super().__init__()
        self.products, self.shapes = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket.__name__ in ("mm", "addmm")
        if isinstance(result, torch.Tensor) and all(result is not x for x in args) and not result._is_view():
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize(
    ("wanted", "given", "products"),
    [
        (("hidden", "head"), ("hidden", "head"), 3),  # logits, and a product for each gradient
        (("hidden",), ("hidden", "head"), 2),
        (("head",), ("hidden", "head"), 2),
        (("bias",), ("hidden", "head", "bias"), 1),
        (("hidden", "rows"), ("hidden", "head", "rows"), 5),  # three of them of S columns
        (("rows",), ("hidden", "head", "rows"), 3),
        ((), INPUTS, 2),
    ],
)
def test_what_is_frozen_costs_no_memory_and_no_product(wanted, given, products):
    """Risk: `parts sink` still holds a gradient [V, D] in fp32, or computes it and throws it away."""
    made, targets = inputs(wanted)
    with Work() as work:
        loss = chunked({key: made[key] for key in given}, targets, 25)
        if wanted:
            loss.backward()
    assert work.products == 2 * products  # two chunks
    assert ((301, 16) in work.shapes) == ("head" in wanted)
    assert ((50, 16) in work.shapes) == ("hidden" in wanted)
    assert all((made[key].grad is not None) == (key in wanted) for key in INPUTS)


def test_the_loss_head_is_the_models_own_with_its_bias_and_no_parameter_more():
    """Risk: a head with a bias (Phi) loses it, or rows that belong to another module are saved twice."""
    made, targets = inputs(INPUTS)
    linear = torch.nn.Linear(16, 301)
    head, rows = LossHead(linear, chunk=13), torch.nn.Parameter(made["rows"].detach())
    x = {"hidden": made["hidden"], "head": linear.weight, "bias": linear.bias}
    for given, call in ((x, {}), ({**x, "rows": rows}, {"rows_SD": rows, "first_row": FIRST})):
        loss, nll_N = head(made["hidden"], targets, **call)
        want = torch.autograd.grad(plainly(given, targets), list(given.values()))
        for a, b in zip(torch.autograd.grad(loss, list(given.values())), want):
            assert (a - b).abs().max() < 1e-6
        assert (nll_N.sum() / (targets != IGNORE).sum() - plainly(given, targets)).abs() < 1e-5
    assert [(name, id(p)) for name, p in head.named_parameters()] == [
        ("weight", id(linear.weight)),
        ("bias", id(linear.bias)),
    ]
    assert torch.equal(head(made["hidden"]), linear(made["hidden"]))


def test_under_autocast_bias_and_rows_get_their_gradients_in_their_own_dtype():
    made, targets = inputs(INPUTS)
    want = torch.autograd.grad(plainly(made, targets), list(made.values()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked(made, targets)
    assert loss.dtype == torch.float32
    for a, b in zip(torch.autograd.grad(loss, list(made.values())), want):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 2e-2 * b.norm()


def test_the_softmax_compiles_to_one_graph():
    """Risk: a change to its dtypes breaks the graph, and compiled training loses its speed."""
    torch._dynamo.reset()
    compiled = torch.compile(scaled_softmax, backend="aot_eager", fullgraph=True, dynamic=False)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits, scale = torch.randn(5, 30).to(dtype), torch.rand(5, 1)
        for a, b in zip(compiled(logits.clone(), scale), scaled_softmax(logits.clone(), scale)):
            torch.testing.assert_close(a, b)
