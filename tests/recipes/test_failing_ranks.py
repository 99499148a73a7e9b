"""Guards: what happens to one rank, or is sent to only one, ends all of them, soon and with one message."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import pytest

from recipes.training.processes.launch import free_port
from sinkmodel.checkpoint import checkpoint_steps
from tests import tiny
from tests.kills import children_of, kill_again_and_again
from tests.processes import Program
from tests.recipes.runs import QUICK, arguments, foreign_id, start_process, wait_for_checkpoint


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
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGUSR1, stderr
    assert "SIGUSR1 came to another rank" in stderr
    assert f"stopped at step {max(checkpoint_steps(run))} of 100000" in stderr
    assert stderr.count("stopped at step") == 1
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_with_a_message(data, tmp_path):
    run = tmp_path / "run"
    process = start_process(data, run, **(QUICK | {"schedule__steps": 100_000}), training__devices=2)
    wait_for_checkpoint(process, run, 3)
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "has lost the others" in stderr or "rank 1 was ended by SIGKILL" in stderr
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_in_bounded_time(data, tmp_path):
    run = tmp_path / "run"
    settings = QUICK | {"schedule__steps": 100_000, "training__devices": 2, "training__timeout": 8}
    process = start_process(data, run, **settings)
    wait_for_checkpoint(process, run, 3)
    hung = children_of(process.pid)[1]
    os.kill(hung, signal.SIGSTOP)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr
    assert "no progress for 8 s after step" in stderr
    assert "recipes/training" in (run / "hang-rank0.txt").read_text(), "the place in the code at which rank 0 waited"
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
        output, codes = by_hand(data, run, changes)
        assert codes == [2, 2], output
        assert message in output, output
        assert output.count("sink-pretrain:") == 1
        assert not run.exists()


def by_hand(data, run, of_rank_1) -> tuple[str, list[int]]:
    """Two ranks started as torchrun would, the second with other settings."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank, changes in enumerate(({}, of_rank_1)):
        words = arguments(data, **({"output": run} | QUICK | changes))
        ranks.append(Program("recipes.pretrain", words, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
    stderr = [process.communicate(timeout=120)[1] for process in ranks]
    return "".join(stderr), [process.returncode for process in ranks]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_an_id_that_one_rank_alone_reads_ends_the_run_with_its_message(tmp_path, devices):
    """Risk: the traceback of the process that reads ahead is printed; or that process is waited for without end."""
    data = foreign_id(tmp_path / "data", "train", slice(1_000_000, None), 220_000)  # all ranks read those before
    settings = QUICK | {"data__verify": "sizes", "data__workers": 1, "schedule__steps": 3000}
    process = start_process(data, tmp_path / "run", **settings, training__devices=devices)
    _, stderr = process.communicate(timeout=180)
    assert process.returncode == 2, stderr
    assert "sink-pretrain: the shard" in stderr
    assert "holds the id 300 at token 1,0" in stderr
    assert "Traceback" not in stderr
    assert "no progress for" not in stderr
