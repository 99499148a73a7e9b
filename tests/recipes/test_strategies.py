"""Guards: on several processes a run that was killed is the run that was not, and a checkpoint knows no strategy."""

from __future__ import annotations

import signal

import pytest
import torch

from sinkmodel.checkpoint import checkpoint_steps
from sinkmodel.loading import load_checkpoint
from tests.recipes.runs import (
    QUICK,
    STEPS,
    assert_same_run,
    complete,
    final_state,
    numbers,
    start_as_users_do,
    start_process,
    train,
    wait_for_checkpoint,
)

SHARING = ("ddp", "fsdp2", "deepspeed_stage_0", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The same run on one process, with twice the accumulation."""
    return train(data, tmp_path_factory.mktemp("alone") / "run", **QUICK)


def assert_close(a, b, rounding: float) -> None:
    """Weights and moments, and every logged number; perplexity is the exponential of one of them."""
    state_a, state_b = final_state(a, STEPS), final_state(b, STEPS)
    assert state_a.keys() == state_b.keys()
    assert max((state_a[name].float() - state_b[name].float()).abs().max().item() for name in state_a) < rounding
    for ours, theirs in zip(numbers(a), numbers(b)):
        for key, value in theirs.items():
            if not key.endswith("ppl"):
                assert float(ours[key] or 0) == pytest.approx(float(value or 0), abs=rounding), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "precision", "processes"),
    [
        *((strategy, "fp32", 2) for strategy in SHARING),
        ("ddp", "fp32", 4),  # from three on the order of a sum matters
        ("deepspeed_stage_1", "bf16", 2),
        ("fsdp2", "bf16", 2),
    ],
)
def test_processes_that_were_killed_end_with_the_same_bits(data, alone, tmp_path, strategy, precision, processes):
    """Under accumulation (two micro-batches a rank), with workers; and what they learn is what one process learns.

    In bf16 the weights that are kept are those in fp32.
    """
    start = start_as_users_do if (strategy, processes) == ("ddp", 2) else start_process
    settings = {"training__strategy": strategy, "training__micro_rows": 4 // processes, "data__workers": 1}
    settings |= {"training__precision": precision, "checkpoints__early": True, "training__devices": processes}
    whole, run = tmp_path / "whole", tmp_path / "run"
    stderr = complete(data, whole, start=start, **settings)
    assert f"{processes} process(es), {strategy}" in stderr
    process = start(data, run, **QUICK, **settings)
    wait_for_checkpoint(process, run, 6)
    process.kill()  # the launcher alone: its ranks go with it
    process.wait()
    assert max(checkpoint_steps(run)) < STEPS
    assert "resuming from" in complete(data, run, start=start, **settings)
    assert_same_run(run, whole, STEPS)
    model, _, _ = load_checkpoint(whole)  # without the processes that trained it
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in model.parameters())
    assert_close(whole, alone, 2e-3 if precision == "fp32" else 0.1)
    for step in (0, STEPS):
        state = final_state(whole, step)
        assert len([w for w in state.values() if (w != w.bfloat16().float()).any()]) >= 10
    assert {state.item() for name, state in final_state(whole, STEPS).items() if name.endswith(".step")} == {STEPS}
    assert not [name for name in final_state(whole, 0) if name.endswith(".step")], "no step was taken before the first"


@pytest.mark.slow
def test_a_run_goes_on_under_any_strategy_and_on_any_number_of_processes(data, alone, tmp_path):
    """2 → 1 → 4, sharded → whole → sharded another way: the same rows, and numbers equal to rounding."""
    run = tmp_path / "run"
    path = [(2, "deepspeed_stage_3", 4), (1, "auto", 4), (4, "fsdp2", 2), (2, "deepspeed_stage_1", 4)]
    for stop, (processes, strategy, rows) in zip((6, 9, 15, STEPS), path):
        settings = QUICK | {"training__strategy": strategy, "training__micro_rows": rows}
        if stop == STEPS:
            stderr = complete(data, run, processes, **settings)
            assert "on 2 processes instead of 4: the same rows, losses equal up to rounding" in stderr
            break
        process = start_process(data, run, **settings, training__devices=processes)
        wait_for_checkpoint(process, run, stop)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 128 + signal.SIGTERM, stderr
        assert "saved; resume with the same command" in stderr
    assert [row["step"] for row in numbers(run)] == [row["step"] for row in numbers(alone)]
    assert_close(run, alone, 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_stage_3"])
def test_a_head_that_shares_its_weight_with_the_embeddings_is_sharded_and_put_together(data, tmp_path, strategy):
    settings = QUICK | {"model__tie_embeddings": True, "schedule__steps": 6}
    plain = train(data, tmp_path / "plain", **settings)
    complete(data, tmp_path / "run", **settings, training__strategy=strategy)
    weights, expected = final_state(tmp_path / "run", 6), final_state(plain, 6)
    assert weights.keys() == expected.keys()
    assert max((weights[name] - expected[name]).abs().max().item() for name in expected) < 2e-3
