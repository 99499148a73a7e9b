"""Submitting the shipped sbatch files to a throw-away cluster, and watching what becomes of the jobs."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY"}


@dataclass(frozen=True)
class Cluster:
    """
    Args:
        folder: the cluster's own files.
        site: the site file that jobs are submitted with.
        environment: in which SLURM's commands find the cluster, and jobs their site file.
        logs: folder of the jobs' logs.
    """

    folder: Path
    site: Path
    environment: dict[str, str]
    logs: Path

    def command(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment, cwd=ROOT)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: str, arguments: list[str], *options: str) -> str:
        """Number of the job that runs slurm/SCRIPT as it is shipped; submitted as slurm/README.md says."""
        log = "%A-%a.out" if script in ("twins.sbatch", "eval.sbatch") else "%j.out"
        words = ["sbatch", "--parsable", f"--output={self.logs / log}", *options, f"slurm/{script}", *arguments]
        return self.command("bash", "-c", '. "$SINK_SITE"; "$@"', "bash", *words).strip()

    def show(self, job: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, ExitCode, NodeList …"""
        shown = self.command("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def seconds(self, job: str) -> int:
        """For how long it has run since its last start."""
        hours, minutes, seconds = self.show(job)["RunTime"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + int(seconds)

    def log(self, job: str) -> str:
        """Of an array all tasks' logs together."""
        paths = sorted(self.logs.glob(f"{job}*.out"))
        return "".join(path.read_text(errors="replace") for path in paths)

    def wait_until(self, what: Callable[[], bool], job: str, seconds: float = 150) -> None:
        """Until `what()` is true; fails, with the job's log, when that takes too long or the job has failed before."""
        until = time.monotonic() + seconds
        while not what():
            state = self.show(job)
            message = f"job {job} is {state['JobState']}, {state.get('Reason')}; its log:\n{self.log(job)}"
            assert time.monotonic() < until, f"waited for {seconds} s; {message}"
            assert state["JobState"] not in ENDED or what(), message
            time.sleep(0.2)

    def wait(self, job: str, seconds: float = 240) -> dict[str, str]:
        """Until the job, or every task of an array, has ended; returns its last state."""
        until = time.monotonic() + seconds
        while True:
            states = re.findall(r"JobState=(\w+)", self.command("scontrol", "--oneliner", "show", "job", job))
            if states and all(state in ENDED for state in states):
                return {**self.show(job), "states": " ".join(states)}
            assert time.monotonic() < until, f"job {job} is {states}; its log:\n{self.log(job)}"
            time.sleep(0.2)

    def boot(self, node: str) -> None:
        """Start a node that was killed, and wait until it can be used."""
        self.command(str(SCRIPT), "boot-node", str(self.folder), node)
        until = time.monotonic() + 60
        while self.command("sinfo", "--noheader", "--nodes", node, "--partition=main", "--format=%T").strip() != "idle":
            assert time.monotonic() < until, self.command("scontrol", "show", "node", node)
            time.sleep(0.2)

    def finish(self, job: str, seconds: float = 240) -> dict[str, str]:
        """`wait`, for jobs that must succeed."""
        state = self.wait(job, seconds)
        assert set(state["states"].split()) == {"COMPLETED"}, f"{state}\n{self.log(job)}"
        return state
