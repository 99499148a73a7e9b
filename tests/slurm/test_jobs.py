"""Guards: what the sbatch files ask of SLURM, and what their scripts do with it; without a cluster, its words doubled.

tests/cluster submits the same files to a real one, which does not fail without a line that only a larger cluster needs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sinkmodel.results.files import content_of
from sinkmodel.results.perplexity import PerplexityResult, PerplexityRow

ROOT = Path(__file__).resolve().parents[2]
ALL = sorted(path.name for path in (ROOT / "slurm").glob("*.sbatch"))
ARRAYS, TRAINING = {"twins.sbatch", "eval.sbatch"}, {"pretrain.sbatch", "twins.sbatch", "evolve.sbatch"}


def asked_of_slurm(script: str) -> dict[str, str]:
    """The lines #SBATCH of a file; `--requeue` has no value."""
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", (ROOT / "slurm" / script).read_text(), re.M)
    assert len(lines) == len(dict(lines))
    return dict(lines)


@pytest.mark.parametrize("script", ALL)
def test_every_job_comes_back_and_keeps_its_log(script):
    """Risk: a site that does not requeue by default (JobRequeue=0) loses the job, or a restart overwrites the log."""
    asked = asked_of_slurm(script)
    assert asked["requeue"] == ""
    assert asked["open-mode"] == "append"
    assert asked["output"] == ("%x-%A-%a.out" if script in ARRAYS else "%x-%j.out"), "one file a job, or a task"
    assert ("array" in asked) == (script in ARRAYS)
    assert asked.keys().isdisjoint({"account", "partition", "qos", "constraint", "gres", "gpus-per-node"}), "the site's"


@pytest.mark.parametrize("script", sorted(TRAINING))
def test_training_has_whole_nodes_and_five_minutes_to_save(script):
    """Risk: the signal goes to the script alone (`B:`), or comes too late; another job takes the node's memory."""
    asked = asked_of_slurm(script)
    assert asked["signal"] == "USR1@300"
    assert (asked["exclusive"], asked["mem"], asked["nodes"]) == ("", "0", "1")


@pytest.mark.parametrize("script", sorted(ARRAYS))
def test_an_array_needs_no_option_to_be_one(script):
    assert asked_of_slurm(script)["array"] == {"twins.sbatch": "0-1", "eval.sbatch": "0-7"}[script]


# ------------------------------------------------------------------------------------------------ the scripts, run here

STAND_IN = r"""#!/bin/bash
name=${0##*/}
printf '%s\0' "$name" "$@" >>"$DOUBLES/calls" && printf '\0' >>"$DOUBLES/calls"
if [ "$name" = srun ]; then
  while [[ $1 == --* ]]; do shift; done
  [ "$1" = bash ] && exit "${NODES_SAY:-0}"
  echo "OMP_NUM_THREADS=$OMP_NUM_THREADS" >>"$DOUBLES/threads"
  exec "$@"
elif [ "$name" = scontrol ] && [ "$1" = show ]; then
  echo "JobId=17 ${JOB:-JobState=RUNNING PreemptTime=None}"
elif [ "$name" = sink-export ]; then
  mkdir -p "$4"
elif [ "$name" = sink-eval ]; then
  [[ $3 != */${BROKEN:-none} ]] || exit 1
  printf %s "$RESULT" >"${!#}"
elif [ "$name" = sink-pretrain ] || [ "$name" = sink-evolve ]; then
  [ -z "${SIGNAL:-}" ] || { kill -s "$SIGNAL" $PPID && sleep 0; }
  exit "${CODE:-0}"
fi
"""
DOUBLED = (
    *("srun", "scontrol", "sleep", "timeout"),
    *("sink-pretrain", "sink-evolve", "sink-prepare", "sink-export", "sink-eval", "sink-push"),
)

ROW = PerplexityRow(
    policy="sink",
    sinks=1,
    window=7,
    tokens=9,
    nll=1.5,
    nll_after_overflow=None,
    stderr_after_overflow=None,
    by_position=[],
)
RESULT = PerplexityResult(model="m", budget=8, rows=[ROW])  # that the stand-in of sink-eval writes


@dataclass
class Job:
    folder: Path

    def run(self, script: str, *arguments: str, **environment: object) -> subprocess.CompletedProcess:
        """As SLURM's batch step would: a job of two nodes, eight processes each."""
        (self.folder / "calls").write_text("")
        env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SINK_", "OMP_"))}
        env |= {"PATH": f"{self.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
        env |= {
            "RESULT": json.dumps(content_of(RESULT)),
            "DOUBLES": str(self.folder),
            "SINK_SITE": str(self.folder / "site.sh"),
        }
        env |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2"}
        env |= {"SLURM_CPUS_ON_NODE": "96", **{key: str(value) for key, value in environment.items()}}
        # A copy, run from elsewhere, is what SLURM runs.
        copy = self.folder / "slurm_script"
        copy.write_text((ROOT / "slurm" / script).read_text())
        return subprocess.run(
            ["bash", copy, *arguments], env=env, cwd=self.folder, capture_output=True, text=True, timeout=60
        )

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of every call of a program, in order."""
        calls = [call.split("\0") for call in (self.folder / "calls").read_text().split("\0\0")]
        return [words[1:] for words in calls if words[0] == name]

    def requeued(self) -> bool:
        return ["requeue", "17"] in self.calls("scontrol")


@pytest.fixture
def job(tmp_path):
    for name in DOUBLED:
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "timeout").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    (tmp_path / "site.sh").write_text("SINK_TASKS_PER_NODE=8\nSINK_PREFIX=() SINK_SRUN=()\n")
    return Job(tmp_path)


@pytest.mark.parametrize("name", ["pretrain", "evolve"])
def test_a_process_a_gpu_with_its_share_of_the_cores_and_all_end_with_one(job, name):
    """Risk: ranks that live wait for one that has died, or each starts as many threads as the node has cores."""
    prefix = "SINK_PREFIX=(env IN=container) SINK_SRUN=(--container-image='an image')"
    (job.folder / "site.sh").write_text(f"SINK_TASKS_PER_NODE=8\n{prefix}\n")
    assert job.run(f"{name}.sbatch", "--output", "a folder").returncode == 0
    nodes, start = job.calls("srun")
    assert nodes[:3] == ["--overlap", "--ntasks=2", "--ntasks-per-node=1"]
    assert start == [
        *("--kill-on-bad-exit=1", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=12"),
        *("--container-image=an image", "env", "IN=container", f"sink-{name}", "--output", "a folder"),
    ]
    assert (job.folder / "threads").read_text() == "OMP_NUM_THREADS=12\n"


@pytest.mark.parametrize(
    ("code", "environment", "requeued"),
    [
        (0, {}, False),
        (2, {"SINK_SHORTEST_RUN": 0}, False),  # another start would not mend it
        (1, {"SINK_SHORTEST_RUN": 0}, False),  # and a failure of the program would come again
        (138, {"SINK_SHORTEST_RUN": 0}, True),  # rank 0 had no scontrol
        (143, {"SINK_SHORTEST_RUN": 0}, True),
        (143, {}, False),  # srun's own SIGTERM: one process cannot start, and never will
        (143, {"JOB": "JobState=RUNNING PreemptTime=2030-01-01T00:00:00"}, True),  # SLURM wants the nodes
        (143, {"SINK_SHORTEST_RUN": 0, "JOB": "JobState=CANCELLED PreemptTime=None"}, False),
        (138, {"SINK_SHORTEST_RUN": 0, "JOB": "JobState=PENDING PreemptTime=None"}, False),  # rank 0 has done it
        (137, {"NODES_SAY": 1}, True),  # a node has died unnoticed
        (1, {"NODES_SAY": 1}, True),
        (2, {"NODES_SAY": 1}, False),
    ],
)
def test_a_job_goes_back_to_the_queue_where_another_start_would_help(job, code, environment, requeued):
    """Risk: a job that was stopped ends for good, or one that always fails is tried for ever."""
    done = job.run("pretrain.sbatch", CODE=code, **environment)
    assert (done.returncode, job.requeued()) == (code, requeued), done.stderr
    waits = [int(seconds) for (seconds,) in job.calls("sleep")]
    # For SLURM to end the script, after its requeueing; and before, to notice the node by itself.
    assert waits == ([900, 600] if requeued and "NODES_SAY" in environment else [600] if requeued else [])


@pytest.mark.parametrize("number", ["USR1", "TERM"])
def test_the_script_outlives_a_signal_that_is_for_the_program(job, number):
    """Risk: the script dies first, and with it the save."""
    done = job.run("pretrain.sbatch", CODE=138, SIGNAL=number, SINK_SHORTEST_RUN=0)
    assert (done.returncode, job.requeued()) == (138, True), done.stderr


def trained(job, *arguments: str, **environment: object) -> list[str]:
    """Kind, seed and folder of the last words of sink-pretrain."""
    done = job.run("twins.sbatch", "runs/twins", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    ((*_, config, kind, seed_option, seed, output_option, output),) = [
        words[words.index("sink-pretrain") + 1 :] for words in job.calls("srun") if "sink-pretrain" in words
    ]
    assert (config, seed_option, output_option) == ("--config", "--seed", "--output")
    return [kind, seed, output]


def test_twins_are_an_array_over_kinds_and_seeds(job):
    """Risk: tasks of the array train the same twin, or miss one, or a folder is not what it is called."""
    trainings = [trained(job, "--config=tiny", SLURM_ARRAY_TASK_ID=task) for task in range(4)]
    assert trainings == [
        ["sink-none", "1234", "runs/twins/none-seed1234"],
        ["sink-token", "1234", "runs/twins/token-seed1234"],
        ["sink-none", "1235", "runs/twins/none-seed1235"],
        ["sink-token", "1235", "runs/twins/token-seed1235"],
    ]
    kinds = ["none", "token", "zero", "logit", "kv_bias"]
    changed = {"SINK_KINDS": " ".join(kinds), "SINK_FIRST_SEED": 7}
    trainings = [trained(job, "--config=tiny", SLURM_ARRAY_TASK_ID=task, **changed) for task in range(10)]
    assert trainings == [
        [f"sink-{kind}", str(seed), f"runs/twins/{kind}-seed{seed}"] for seed in (7, 8) for kind in kinds
    ]


def test_no_argument_makes_two_twins_alike(job):
    """Risk: a --seed or --output among the arguments wins over the task's own."""
    words = ("--seed", "1", "--output", "one", "--config", "sink-token")
    assert trained(job, *words, SLURM_ARRAY_TASK_ID=0) == ["sink-none", "1234", "runs/twins/none-seed1234"]


@pytest.fixture
def run_folder(tmp_path):
    run = tmp_path / "a run"
    (run / "checkpoints").mkdir(parents=True)
    for step in (5, 10, 20, 40, 100):
        (run / "checkpoints" / f"step{step}.ckpt").touch()
    return run


def task_of(task: int, array: int = 7) -> dict[str, object]:
    """The tasks of an array are jobs with numbers of their own."""
    return {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_JOB_ID": array, "SLURM_JOB_ID": array + task}


def exported(job) -> list[str]:
    """Steps, in order."""
    return [Path(words[1]).stem for words in job.calls("sink-export")]


def test_the_evaluation_measures_every_checkpoint_and_collects_one_table(job, run_folder, tmp_path):
    folder = tmp_path / "ppl"
    done = job.run("eval.sbatch", str(run_folder), str(folder), "--text", "a book", **task_of(0))
    assert done.returncode == 0, done.stderr
    assert exported(job) == [f"step{step}" for step in (5, 10, 20, 40, 100)]
    for words in job.calls("sink-eval"):
        assert words[:5] == ["ppl", "--model", words[2], "--text", "a book"]
        assert words[5:] == ["--json", f"{folder / Path(words[2]).name}.json"]
    assert [line.split(",")[0] for line in (folder / "table.csv").read_text().splitlines()[1:]] == [
        *("5", "10", "20", "40", "100")
    ]
    assert not list((folder / "models").iterdir())


def test_the_tasks_of_the_evaluation_share_the_checkpoints(job, run_folder, tmp_path):
    """Risk: a checkpoint is left out or done twice, while a run that continues writes some and removes others."""
    folder, checkpoints = tmp_path / "ppl", run_folder / "checkpoints"
    words = ("eval.sbatch", str(run_folder), str(folder), "--text", "a book")
    claims = folder / ".claims"
    claims.mkdir(parents=True)
    (claims / "7-step5").symlink_to("1")  # task 1 is at it
    (claims / "7-step10").symlink_to("0")  # task 0 was, before it was requeued
    (claims / "6-step20").symlink_to("1")  # of an array that has ended
    assert job.run(*words, **task_of(0)).returncode == 0
    assert exported(job) == ["step10", "step20", "step40", "step100"]
    (checkpoints / "step40.ckpt").unlink()
    (checkpoints / "step200.ckpt").touch()
    assert job.run(*words, **task_of(1)).returncode == 0
    assert exported(job) == ["step5", "step200"]
    assert job.run(*words, **task_of(2)).returncode == 0
    assert exported(job) == []


def test_results_of_other_arguments_are_not_mixed(job, run_folder, tmp_path):
    """Risk: half of a table is of one book and half of another."""
    folder = tmp_path / "ppl"
    words = ("eval.sbatch", str(run_folder), str(folder), "--text")
    assert job.run(*words, "a book", **task_of(0)).returncode == 0
    done = job.run(*words, "another", **task_of(0, array=20))
    assert done.returncode == 2
    assert "holds the results of:" in done.stderr
    assert exported(job) == []
    assert job.run(*words, "a book", **task_of(0, array=30)).returncode == 0


def test_one_checkpoint_that_fails_costs_its_own_result_and_is_done_again(job, run_folder, tmp_path):
    """Risk: the job counts as completed; or the others are lost, or made once more."""
    words = ("eval.sbatch", str(run_folder), str(tmp_path / "ppl"), "--text", "book")
    done = job.run(*words, **task_of(0), BROKEN="step20")
    assert done.returncode == 1
    assert "step 20 has no result" in done.stderr
    assert exported(job) == ["step5", "step10", "step20", "step40", "step100"]
    assert (tmp_path / "ppl" / "table.csv").read_text().count("\n") == 5
    assert job.run(*words, **task_of(0, array=20)).returncode == 0
    assert exported(job) == ["step20"]


def test_a_number_of_workers_that_is_typed_wins_over_that_of_the_cores(job):
    assert job.run("prepare.sbatch", "--workers", "3", "--input", "a file", SLURM_CPUS_PER_TASK=32).returncode == 0
    assert job.calls("sink-prepare") == [["--workers", "32", "--workers", "3", "--input", "a file"]]


def test_push_pushes_the_run_with_the_options_that_are_given(job, tmp_path):
    """Risk: an option is lost on its way, or a folder with a blank in its name is two."""
    run = f"{tmp_path}/a run"
    assert job.run("push.sbatch", run, "me/sink", "--dtype", "bfloat16", "--follow").returncode == 0
    assert job.calls("sink-push") == [["--run", run, "--repo", "me/sink", "--dtype", "bfloat16", "--follow"]]
    assert "ntasks=1" in " ".join(job.calls("srun")[0])


@pytest.mark.parametrize("words", [[], ["a run"], ["a run", "sink"]])
def test_push_without_a_name_on_the_hub_is_refused(job, words):
    done = job.run("push.sbatch", *words)
    assert done.returncode == 2
    assert "push.sbatch takes a run folder and the model's name on the Hub, USER/NAME" in done.stderr
    assert job.calls("srun") == []
