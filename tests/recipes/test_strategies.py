"""Guards: on several processes a run that was killed is the run that was not, and a checkpoint knows no strategy."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from recipes.training.processes.launch import free_port
from sinkmodel.checkpoint import checkpoint_steps, load_checkpoint
from tests import tiny
from tests.kills import children_of, kill_again_and_again
from tests.recipes.runs import (
    arguments,
    assert_same_run,
    final_state,
    numbers,
    start_process,
    train,
    wait_for_checkpoint,
)

STEPS = 20
QUICK = {"schedule__steps": STEPS, "checkpoints__every": 3, "training__timeout": 60}
SHARING = ("ddp", "fsdp2", "deepspeed_stage_0", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The same run on one process, with twice the accumulation."""
    return train(data, tmp_path_factory.mktemp("alone") / "run", **QUICK)


def complete(data, run, processes=2, **changes):
    """Run to the end, on `processes` of this machine; returns what was said."""
    process = start_process(data, run, **(QUICK | {"training__devices": processes} | changes))
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


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
    settings = {"training__strategy": strategy, "training__micro_rows": 4 // processes, "data__workers": 1}
    settings |= {"training__precision": precision, "checkpoints__early": True, "training__devices": processes}
    whole, run = tmp_path / "whole", tmp_path / "run"
    said = complete(data, whole, **settings)
    assert f"{processes} process(es), {strategy}" in said
    process = start_process(data, run, **QUICK, **settings)
    wait_for_checkpoint(process, run, 6)
    process.kill()  # the launcher alone: its ranks go with it
    process.wait()
    assert max(checkpoint_steps(run)) < STEPS
    assert "going on from" in complete(data, run, **settings)
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
            said = complete(data, run, processes, **settings)
            assert "on 2 processes instead of 4: the same rows, losses equal to rounding" in said
            break
        process = start_process(data, run, **settings, training__devices=processes)
        wait_for_checkpoint(process, run, stop)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 128 + signal.SIGTERM, said
        assert "saved; go on with the same command" in said
    assert [row["step"] for row in numbers(run)] == [row["step"] for row in numbers(alone)]
    assert_close(run, alone, 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_2"])
def test_a_signal_that_reaches_one_rank_only_stops_all_at_the_same_step_saved(data, tmp_path, strategy):
    """And a second one, during the save, changes nothing."""
    run = tmp_path / "run"
    settings = QUICK | {"schedule__steps": 100_000, "training__strategy": strategy, "training__devices": 2}
    process = start_process(data, run, **settings)
    wait_for_checkpoint(process, run, 3)
    ranks = children_of(process.pid)
    assert len(ranks) == 2
    for _ in range(2):
        os.kill(ranks[1], signal.SIGUSR1)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGUSR1, said
    assert "SIGUSR1 came to another rank" in said
    assert f"stopped at step {max(checkpoint_steps(run))} of 100000" in said
    assert said.count("stopped at step") == 1
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_stage_3"])
def test_a_head_that_shares_its_weight_with_the_embeddings_is_sharded_and_put_together(data, tmp_path, strategy):
    settings = QUICK | {"model__tie_embeddings": True, "schedule__steps": 6}
    plain = train(data, tmp_path / "plain", **settings)
    complete(data, tmp_path / "run", **settings, training__strategy=strategy)
    weights, expected = final_state(tmp_path / "run", 6), final_state(plain, 6)
    assert weights.keys() == expected.keys()
    assert max((weights[name] - expected[name]).abs().max().item() for name in expected) < 2e-3


@pytest.mark.slow
def test_several_ranks_are_one_wandb_run(data, tmp_path):
    complete(data, tmp_path / "run", schedule__steps=6, logging__wandb=True)
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1
    assert (tmp_path / "run" / "checkpoints" / "wandb.json").exists()


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_with_a_message(data, tmp_path):
    run = tmp_path / "run"
    process = start_process(data, run, **(QUICK | {"schedule__steps": 100_000}), training__devices=2)
    wait_for_checkpoint(process, run, 3)
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "has lost the others" in said or "rank 1 was ended by SIGKILL" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_in_bounded_time(data, tmp_path):
    run = tmp_path / "run"
    settings = QUICK | {"schedule__steps": 100_000, "training__devices": 2, "training__timeout": 8}
    process = start_process(data, run, **settings)
    wait_for_checkpoint(process, run, 3)
    hung = children_of(process.pid)[1]
    os.kill(hung, signal.SIGSTOP)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "nothing has moved for 8 s behind step" in said
    assert "recipes/training" in (run / "hang-rank0.txt").read_text(), "where rank 0 waited"
    assert not os.path.exists(f"/proc/{hung}")


@pytest.mark.slow
def test_deepspeeds_own_group_of_processes_waits_as_long_as_ours(data, tmp_path):
    """Risk: a step that may take an hour ends at the half hour, or the ten minutes, that torch gives a new group."""
    program = (
        "import sys, torch, torch.distributed as dist\n"
        "from recipes.pretrain import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "groups = list(dist.distributed_c10d._world.pg_map)\n"
        "print(*(group._get_backend(torch.device('cpu')).options._timeout for group in groups))"
    )
    settings = QUICK | {"schedule__steps": 1, "training__timeout": 3600, "training__strategy": "deepspeed_stage_2"}
    words = [sys.executable, "-c", program, *arguments(data, tmp_path / "run", **settings)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["1:01:00 1:01:00"], done.stderr


@pytest.mark.slow
def test_a_disk_that_is_full_for_rank_0_stops_all_and_is_said_once(data, tmp_path):
    run = tmp_path / "run"
    words = arguments(data, run, **(QUICK | {"schedule__steps": 100_000, "training__devices": 2}))
    done = subprocess.run(
        [sys.executable, "-m", "recipes.pretrain", *words],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),  # a checkpoint has 540,000
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("the disk is full: step3.ckpt could not be written") == 1
    assert "there is no earlier checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
    assert not checkpoint_steps(run)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_nobody_had_touched_it(tmp_path):
    """The short form of `python -m tests.kills`."""
    settings = QUICK | {"schedule__steps": 400, "checkpoints__every": 10, "logging__every": 1}
    kill_again_and_again(tmp_path, kills=4, seed=7, **settings, training__devices=2, training__micro_rows=2)


@pytest.mark.slow
def test_ranks_that_disagree_all_stop_with_one_message(data, tmp_path):
    """Another learning rate on one rank, another data set, and a config that cannot be read: no hang, exit code 2."""
    other = tiny.prepared(tmp_path / "other", train_words=3000)
    cases = [
        ({"optimizer__lr": 1e-3}, "the ranks disagree: optimizer.lr is 0.003 on rank 0, 0.001 on rank 1"),
        ({"data__path": other}, "the ranks disagree: the fingerprint of the data is"),
        ({"training__micro_rows": "many"}, "rank 1 on "),
        ({"output": tmp_path / "elsewhere"}, "the ranks disagree: output is"),
    ]
    for changes, message in cases:
        run = tmp_path / "run"
        said, codes = by_hand(data, run, changes)
        assert codes == [2, 2], said
        assert message in said, said
        assert said.count("sink-pretrain:") == 1
        assert not run.exists()


def by_hand(data, run, of_rank_1) -> tuple[str, list[int]]:
    """Two ranks started as torchrun would, the second with other settings."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank, changes in enumerate(({}, of_rank_1)):
        words = arguments(data, **({"output": run} | QUICK | changes))
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "recipes.pretrain", *words]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[1] for process in ranks]
    return "".join(said), [process.returncode for process in ranks]
