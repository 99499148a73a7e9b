"""Guards: a run keeps the library of its matrix products, so that a resumed one has the same bits."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F

from recipes.data.rows import IGNORE
from recipes.training.loss import chunked_cross_entropy
from recipes.training.run import _refuse_no_onednn
from sinkmodel import products
from sinkmodel.checkpoint import checkpoint_steps, read_checkpoint
from sinkmodel.errors import UserError
from sinkmodel.products import ONEDNN, SWITCH, TORCH, fast_products
from tests.recipes.runs import assert_same_run, final_state, train

SHORT = {"schedule__steps": 4, "checkpoints__every": 2, "validation__every": 4}


@pytest.fixture
def small(monkeypatch):
    """Small products go through oneDNN too; how many did."""
    times, count = products._times, [0]

    def counted(*args):
        count[0] += 1
        return times(*args)

    monkeypatch.setattr(products, "WORK", 1)
    monkeypatch.setattr(products, "_times", counted)
    return count


def stated(run):
    return {
        step: read_checkpoint(path)["recipe"]["provenance"]["products"] for step, path in checkpoint_steps(run).items()
    }


def test_a_resumed_run_computes_as_it_did(data, tmp_path, monkeypatch, capsys, small):
    """Risk: another machine, or another measurement, resumes with other bits and without a word."""
    monkeypatch.setattr(products, "_faster", lambda backward: ONEDNN)
    monkeypatch.setenv(SWITCH, "auto")
    whole, run = train(data, tmp_path / "whole", **SHORT), tmp_path / "run"
    assert stated(whole) == {2: ONEDNN, 4: ONEDNN}
    assert small[0] > 4 * 2 * 8 * 3, "forward and backward of 8 layers, and the loss's, of every micro-batch"
    shutil.copytree(whole, run)
    (run / "checkpoints" / "step4.ckpt").unlink()
    monkeypatch.setattr(products, "_faster", lambda backward: TORCH)
    train(data, run, **SHORT)
    assert_same_run(run, whole, 4)
    assert "matrix products" not in capsys.readouterr().err

    (run / "checkpoints" / "step4.ckpt").unlink()
    monkeypatch.setenv(SWITCH, "torch")
    small[0] = 0
    train(data, run, **SHORT)
    line = "matrix products by torch, before by onednn: losses are equal up to rounding, not to the bit"
    assert line in capsys.readouterr().err
    assert stated(run) == {2: ONEDNN, 4: TORCH}
    assert small[0] == 0
    before = final_state(whole, 4)
    assert all(torch.allclose(value, before[name], atol=1e-4) for name, value in final_state(run, 4).items())


def test_a_rank_without_the_product_refuses(monkeypatch):
    """Risk: one rank of several computes in another way than rank 0 has chosen."""
    _refuse_no_onednn(ONEDNN)
    monkeypatch.setattr("recipes.training.run.usable", lambda: False)
    _refuse_no_onednn(TORCH)
    with pytest.raises(UserError, match="set SINKMODEL_PRODUCTS=torch"):
        _refuse_no_onednn(ONEDNN)


def test_the_loss_is_the_plain_one(small):
    """Risk: the three products of the head, which no layer computes, are others or stay slow."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(50, 16, requires_grad=True), torch.randint(0, 301, (50,))
    head = (torch.randn(301, 16) * 0.3).requires_grad_()
    targets[::7] = IGNORE
    plain = F.cross_entropy(hidden @ head.T, targets, ignore_index=IGNORE)
    with fast_products(ONEDNN):
        loss, _ = chunked_cross_entropy(hidden, head, targets, 25)
    assert small == [2 * 3]
    assert abs(loss.item() - plain.item()) < 1e-5
    for got, want in zip(torch.autograd.grad(loss, [hidden, head]), torch.autograd.grad(plain, [hidden, head])):
        assert (got - want).abs().max() < 1e-5
