"""Guards: a job that is interrupted in any of the ways of a real cluster resumes by itself, and nothing changes.

Each test interrupts the same run of two nodes and compares it, bit by bit, with the one that nobody touched.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from sinkmodel.checkpoint import read_metrics
from tests.cluster.jobs import SCRIPT
from tests.recipes.runs import arguments, assert_same_run

pytestmark = pytest.mark.cluster

STEPS = 1000
RARELY = {"checkpoints__every": 100, "validation__every": 500, "logging__every": 20}  # most of the time is training


def words(data: Path, run: Path, steps: int = STEPS) -> list[str]:
    return arguments(data, run, schedule__steps=steps, **RARELY)


def steps_logged(run: Path) -> int:
    return max((int(row["step"]) for row in read_metrics(run)), default=0)


def started(cluster, data, run: Path, *options: str) -> str:
    """A job on two nodes that is past its first checkpoint and far from its end."""
    job = cluster.submit("pretrain.sbatch", words(data, run), "--nodes=2", *options)
    cluster.wait_until(lambda: steps_logged(run) >= 120, job)
    return job


def assert_went_on(cluster, job: str, run: Path, undisturbed: Path) -> None:
    """The job has ended well, after at least one start from a checkpoint, and with the bits of the undisturbed run."""
    state = cluster.finish(job)
    assert int(state["Restarts"]) >= 1
    assert f"resuming from {run}/checkpoints/step" in cluster.log(job)
    assert_same_run(undisturbed, run, STEPS)


@pytest.fixture(scope="module")
def undisturbed(cluster, data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    job = cluster.submit("pretrain.sbatch", words(data, run), "--nodes=2")
    assert cluster.finish(job)["Restarts"] == "0"
    return run


def test_two_nodes_train_together_and_each_says_how_it_is(cluster, undisturbed):
    """Risk: srun starts two runs of one process instead of one of two, or nodes that nobody can tell apart."""
    assert steps_logged(undisturbed) == STEPS
    (log,) = (log for path in cluster.logs.glob("*.out") if str(undisturbed) in (log := path.read_text()))
    assert "2 process(es) on 2 nodes, ddp" in log
    lines = re.findall(r"^node (n\d): no GPU; free: memory \d+ GB, disk \S+; restart 0$", log, re.M)
    assert sorted(lines) == ["n1", "n2"]


def test_a_job_at_its_time_limit_saves_and_goes_on_by_itself(cluster, data, undisturbed, tmp_path):
    """Risk: the limit comes unannounced, or the job saves and is not put back into the queue."""
    job = started(cluster, data, tmp_path / "run", "--signal=USR1@20")
    # A fast machine would be done before any limit: the ranks stand still from here on. SLURM counts limits in minutes
    # and looks twice a minute, so that it needs 50 seconds to send the signal in time. It wakes them; should it not,
    # CONT does.
    cluster.command("scancel", "--signal=STOP", job)
    limit = (cluster.seconds(job) + 50) // 60 + 1
    cluster.command("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    cluster.wait_until(lambda: cluster.show(job)["Restarts"] == "1" or cluster.seconds(job) >= 60 * limit - 10, job)
    if cluster.show(job)["Restarts"] == "0":
        cluster.command("scancel", "--signal=CONT", job)
    cluster.wait_until(lambda: cluster.show(job)["Restarts"] == "1", job)
    cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # once is enough
    assert_went_on(cluster, job, tmp_path / "run", undisturbed)
    assert "SIGUSR1: saving at the end of this step" in cluster.log(job)


def test_scancel_with_a_signal_saves_and_requeues(cluster, data, undisturbed, tmp_path):
    """Risk: the signal reaches the script or one rank alone, and the job dies or hangs."""
    job = started(cluster, data, tmp_path / "run")
    cluster.command("scancel", "--signal=USR1", job)
    assert_went_on(cluster, job, tmp_path / "run", undisturbed)
    assert f"job {job} is back in the queue" in cluster.log(job), "by rank 0, not by the script"


def test_preemption_loses_nothing(cluster, data, undisturbed, tmp_path):
    """Risk: what was trained since the last checkpoint is lost, or the job is not put back into the queue."""
    job = started(cluster, data, tmp_path / "run")
    urgent = ["--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"]
    cluster.finish(cluster.command("sbatch", "--parsable", *urgent).strip())
    assert_went_on(cluster, job, tmp_path / "run", undisturbed)
    saved, resumed = (re.search(rf"{what}(\d+)", cluster.log(job)) for what in ("stopped at step ", "from .*/step"))
    assert saved[1] == resumed[1], "it resumed from an older checkpoint than the one that preemption made"


@pytest.mark.parametrize("place", [1, 0], ids=["a node", "the node of the script and of rank 0"])
def test_a_job_whose_node_dies_goes_on_without_it(cluster, data, undisturbed, tmp_path, place):
    """Risk: the ranks that live end the job as failed, or hold it for ever, and nobody requeues it."""
    job = started(cluster, data, tmp_path / "run")
    hosts = cluster.command("scontrol", "show", "hostnames", cluster.show(job)["NodeList"]).split()
    assert len(hosts) == 2
    cluster.command(str(SCRIPT), "kill-node", str(cluster.folder), hosts[place])
    try:
        assert_went_on(cluster, job, tmp_path / "run", undisturbed)
        assert hosts[place] not in cluster.command("scontrol", "show", "hostnames", cluster.show(job)["NodeList"])
    finally:
        cluster.boot(hosts[place])


def test_a_job_that_gets_a_dead_node_waits_until_slurm_knows(cluster, data, tmp_path):
    """Risk: srun cannot start on a node that died unnoticed, and the job fails instead of starting elsewhere."""
    cluster.command(str(SCRIPT), "kill-node", str(cluster.folder), "n2")
    try:
        job = cluster.submit("pretrain.sbatch", arguments(data, tmp_path / "run"), "--nodes=2")
        assert int(cluster.finish(job)["Restarts"]) >= 1
        assert "sink-pretrain has ended with exit code" in cluster.log(job), "srun started on a dead node"
        assert (tmp_path / "run" / "checkpoints" / "step40.ckpt").exists()
    finally:
        cluster.boot("n2")


def test_a_job_whose_program_cannot_reach_slurm_is_requeued_by_its_script(cluster, data, undisturbed, tmp_path):
    """Risk: in a container without scontrol a job that was stopped ends for good."""
    site = tmp_path / "site.sh"
    programs = Path(sys.executable).parent  # of this project, and none of SLURM's
    site.write_text(f"{cluster.site.read_text()}SINK_PREFIX=(env PATH={programs})\nSINK_SHORTEST_RUN=0\n")
    job = started(cluster, data, tmp_path / "run", f"--export=ALL,SINK_SITE={site}")
    cluster.command("scancel", "--signal=USR1", job)
    assert_went_on(cluster, job, tmp_path / "run", undisturbed)
    assert "stopped by a signal: back into the queue" in cluster.log(job)


def test_a_job_that_cannot_start_on_one_node_is_not_tried_for_ever(cluster, data, tmp_path):
    """Risk: srun ends the other ranks by SIGTERM, which looks as if SLURM wanted the nodes, and the job is requeued."""
    site = tmp_path / "site.sh"
    broken = "bash -c '[ \"$SLURM_PROCID\" = 0 ] || exit 127; exec sleep 100'"
    site.write_text(f"{cluster.site.read_text()}SINK_PREFIX=({broken})\n")
    job = cluster.submit("pretrain.sbatch", [], "--nodes=2", f"--export=ALL,SINK_SITE={site}")
    state = cluster.wait(job)
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0")
    assert "exit code 143" in cluster.log(job), "it was not ended by SIGTERM: this test does not try what it says"


def test_a_cancelled_job_has_saved_and_stays_cancelled(cluster, data, tmp_path):
    """Risk: a job that its user has cancelled comes back, or loses what it has trained."""
    run = tmp_path / "run"
    job = cluster.submit("pretrain.sbatch", words(data, run, steps=100_000))
    cluster.wait_until(lambda: steps_logged(run) >= 120, job)
    cluster.command("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    cluster.wait_until(lambda: "it is not returned" in cluster.log(job), job)
    stopped = int(re.search(r"stopped at step (\d+)", cluster.log(job))[1])
    assert (run / "checkpoints" / f"step{stopped}.ckpt").exists()
    assert cluster.show(job)["Restarts"] == "0"


def test_bad_input_ends_the_job_with_its_exit_code_and_one_line(cluster, data, tmp_path):
    """Risk: a job that can never run is retried, or counts as completed."""
    job = cluster.submit("pretrain.sbatch", [*words(data, tmp_path / "run"), "--optimizer.lr=-1"])
    state = cluster.wait(job)
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "2:0")
    assert "sink-pretrain: optimizer.lr is -1.0; it must be above 0" in cluster.log(job)


def test_jobs_say_what_they_lack(cluster, tmp_path):
    """Risk: a job that was submitted without its site file or its arguments fails with a line of bash."""
    missing = tmp_path / "nowhere.sh"
    jobs = {
        cluster.submit("pretrain.sbatch", [], f"--export=ALL,SINK_SITE={missing}"): f"the site file {missing} cannot",
        cluster.submit("twins.sbatch", [str(tmp_path)]): "takes a folder and the arguments of sink-pretrain",
        cluster.submit("eval.sbatch", [str(tmp_path)], "--array=0"): "takes a run folder",
        cluster.submit("push.sbatch", [str(tmp_path)]): "USER/NAME",
    }
    for job, line in jobs.items():
        assert cluster.wait(job)["ExitCode"] == "2:0"
        assert line in cluster.log(job)


def test_the_shipped_site_file_can_be_read_twice_and_sets_what_the_jobs_need(cluster):
    """Risk: the login node reads it, and a job whose environment comes from there stumbles over it."""
    program = (
        "set -eu; for _ in 1 2; do . slurm/site.sh; done; echo $SINK_TASKS_PER_NODE ${#SINK_PREFIX[@]}${#SINK_SRUN[@]}"
    )
    assert cluster.command("bash", "-c", program).split() == ["8", "00"]
