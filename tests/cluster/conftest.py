"""One throw-away cluster for all tests of this folder. If it cannot be started they fail; nothing is skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.cluster.jobs import SCRIPT, Cluster

NODES = 3  # two to train on, and one to continue with when one of them dies
SITE = """\
# The throw-away cluster's site file: all its nodes are this machine.
export SBATCH_PARTITION=main # no partition is the default: a job that has not read this is refused
export PATH="{bin}:$PATH"
export MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1
SINK_TASKS_PER_NODE=1
SINK_PREFIX=() SINK_SRUN=()
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    # Sockets lie in here, whose paths may have 107 characters: no long name.
    folder = tmp_path_factory.mktemp("slurm")
    site, logs = folder / "site.sh", folder / "jobs"
    logs.mkdir()
    site.write_text(SITE.format(bin=Path(sys.executable).parent))
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "SINK_"))}
    env |= {"SLURM_CONF": str(folder / "slurm.conf"), "SINK_SITE": str(site)}
    try:
        subprocess.run([SCRIPT, "start", folder, str(NODES)], check=True)
        yield Cluster(folder, site, env, logs)
    finally:
        subprocess.run([SCRIPT, "stop", folder], check=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return tiny.prepared(tmp_path_factory.mktemp("prepared") / "data")
