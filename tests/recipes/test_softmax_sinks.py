"""Guards: a sink in the softmax is trained as any weight: resumed, compiled, logged, and shared among processes."""

from __future__ import annotations

import math

import pytest
import torch

from recipes.pretrain import main
from sinkmodel.checkpoint import checkpoint_steps, read_metrics
from sinkmodel.loading import load_checkpoint
from sinkmodel.sinks import IN_SOFTMAX, SINK_ATTENTION, kind_of
from tests.recipes.runs import arguments, complete, final_state, numbers, start_process, train, wait_for_checkpoint
from tests.recipes.test_strategies import SHARING

LEARNED = ("logit", "kv_bias")
STEPS = 12
QUICK = {"schedule__steps": STEPS, "checkpoints__every": 4, "logging__every": 2, "validation__every": STEPS}
FEW = QUICK | {"schedule__steps": 4, "training__timeout": 60}


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A run of each kind, and of a twin without a sink, on one process."""
    folder = tmp_path_factory.mktemp("runs")
    return {kind: train(data, folder / kind, sink__kind=kind, **QUICK) for kind in ("none", *IN_SOFTMAX)}


def test_twins_start_alike_and_their_sinks_move(runs):
    starts = {kind: float(read_metrics(run)[0]["loss"]) for kind, run in runs.items()}
    assert max(starts.values()) - min(starts.values()) < 0.05
    trained = {kind: load_checkpoint(run)[0] for kind, run in runs.items()}
    for kind in LEARNED:
        sinks = [p for name, p in trained[kind].named_parameters() if name.endswith(".sink")]
        assert len(sinks) == 2
        assert all(sink.abs().max() > 1e-3 for sink in sinks)
    ids = torch.arange(30)[None]
    logits = {kind: model(ids).logits for kind, model in trained.items()}
    assert all((logits[a] - logits[b]).abs().max() > 1e-4 for a in logits for b in logits if a < b)


def test_rows_hold_text_alone_and_losses_are_over_the_same_targets(runs):
    """Without a token in front there is nothing to shift: loss is that of a vanilla twin, and its tokens too."""
    for kind, run in runs.items():
        rows = [row for row in read_metrics(run) if row["loss"]]
        assert [row["tokens"] for row in rows] == [row["tokens"] for row in read_metrics(runs["none"]) if row["loss"]]
        model, tokenizer, sink_ids = load_checkpoint(run)
        assert sink_ids == []
        assert tokenizer("a b c").input_ids == tokenizer("a b c", add_special_tokens=False).input_ids
        assert kind_of(model.config) == kind
        assert model.config._attn_implementation == ("sdpa" if kind == "none" else SINK_ATTENTION)


@pytest.mark.parametrize("kind", IN_SOFTMAX)
def test_the_sink_metric_is_logged(runs, kind):
    """At the start all scores are about zero: an even spread over the sink and the tokens so far."""
    first, *_ = (row for row in read_metrics(runs[kind]) if row["loss"])
    even = sum(1 / (i + 2) for i in range(64)) / 64
    assert float(first["sink_alpha"]) == pytest.approx(even, rel=0.2)
    for row in read_metrics(runs[kind]):
        if row["loss"]:
            assert 0 < float(row["sink_alpha"]) < 1
            assert (8 * float(row["sink_metric"])).is_integer()  # of two layers with four heads


@pytest.mark.parametrize("kind", IN_SOFTMAX)
def test_killed_and_resumed_it_ends_with_the_same_bits(data, runs, tmp_path, kind):
    run = tmp_path / "run"
    process = start_process(data, run, sink__kind=kind, **QUICK)
    wait_for_checkpoint(process, run, 4)
    process.kill()
    process.wait()
    assert max(checkpoint_steps(run)) < STEPS
    train(data, run, sink__kind=kind, **QUICK)
    assert numbers(run) == numbers(runs[kind])
    state, expected = final_state(run, STEPS), final_state(runs[kind], STEPS)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_a_run_does_not_go_on_with_another_sink(data, runs, tmp_path, capsys):

    for kind in ("token", "zero", "kv_bias"):
        assert main(arguments(data, runs["logit"], sink__kind=kind, **QUICK)) == 2
        assert "sink.kind" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero", "kv_bias"])
def test_compiled_it_learns_the_same(data, runs, tmp_path, kind):
    compiled = train(data, tmp_path / "run", sink__kind=kind, training__compile=True, **QUICK)
    losses = [float(row["loss"]) for row in read_metrics(compiled) if row["loss"]]
    assert losses == pytest.approx([float(row["loss"]) for row in read_metrics(runs[kind]) if row["loss"]], abs=1e-3)
    assert final_state(compiled, STEPS).keys() == final_state(runs[kind], STEPS).keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", IN_SOFTMAX)
def test_in_bf16_it_learns_about_the_same(data, runs, tmp_path, kind):
    """Guards mixed precision, in which attention gets queries and values of two types."""
    half = train(data, tmp_path / "run", sink__kind=kind, training__precision="bf16", **QUICK)
    losses = [float(row["loss"]) for row in read_metrics(half) if row["loss"]]
    assert all(map(math.isfinite, losses))
    assert losses == pytest.approx([float(row["loss"]) for row in read_metrics(runs[kind]) if row["loss"]], abs=0.05)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return {kind: train(data, folder / kind, sink__kind=kind, **FEW) for kind in IN_SOFTMAX}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "strategy", "precision"),
    [
        *(("kv_bias", strategy, "fp32") for strategy in SHARING),
        ("logit", "fsdp2", "fp32"),
        ("logit", "deepspeed_stage_3", "fp32"),
        ("zero", "ddp", "fp32"),
        ("kv_bias", "fsdp2", "bf16"),
        ("kv_bias", "deepspeed_stage_1", "bf16"),
    ],
)
def test_processes_that_share_the_work_learn_what_one_does(data, alone, tmp_path, kind, strategy, precision):
    """A few steps on two processes: weights, moments and every logged number, the sink's share too."""
    run, rounding = tmp_path / "run", 2e-3 if precision == "fp32" else 0.1
    settings = {"sink__kind": kind, "training__strategy": strategy, "training__precision": precision}
    assert f"2 process(es), {strategy}" in complete(data, run, **(FEW | settings))
    state, expected = final_state(run, 4), final_state(alone[kind], 4)
    assert state.keys() == expected.keys()
    assert max((state[name].float() - expected[name].float()).abs().max().item() for name in state) < rounding
    sinks = [name for name in state if name.endswith(".sink")]
    assert len(sinks) == (0 if kind == "zero" else 2)
    assert all(state[name].abs().max() > 1e-3 for name in sinks)
    for ours, theirs in zip(numbers(run), numbers(alone[kind])):
        for key, value in theirs.items():
            if not key.endswith("ppl"):
                assert float(ours[key] or 0) == pytest.approx(float(value or 0), abs=rounding), key
    assert load_checkpoint(run)[0].config.model_type == "sink_gpt_neox"


def test_llama_trains_with_shared_keys(data, tmp_path):
    """Guards a learned key of a KV head that several heads share."""
    shape = {"model__architecture": "llama", "model__kv_heads": 2, "model__rotary_pct": 1.0}
    run = train(data, tmp_path / "run", sink__kind="kv_bias", **shape, **FEW)
    model, _, _ = load_checkpoint(run)
    assert [tuple(layer.self_attn.sink.shape) for layer in model.model.layers] == [(2, 8)] * 2
    assert all(layer.self_attn.sink.abs().max() > 1e-3 for layer in model.model.layers)
