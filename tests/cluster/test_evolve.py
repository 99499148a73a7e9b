"""Guards: an evolution on two nodes, as slurm/evolve.sbatch starts it, that is stopped and resumes by itself."""

from __future__ import annotations

import json
import sys

import pytest

from recipes.evolve import run
from tests.cluster.jobs import ROOT
from tests.recipes.evolving import arguments, files_of, let_pass, make_inputs

pytestmark = pytest.mark.cluster


def test_an_evolution_on_two_nodes_that_is_signalled_is_what_one_process_makes(cluster, tmp_path, monkeypatch):
    """Risk: srun starts two evolutions of one process, the job is not put back, or a generation is lost or doubled."""
    inputs, folder = make_inputs(tmp_path / "inputs"), tmp_path / "run"
    site = tmp_path / "site.sh"
    able = f"env PYTHONPATH={ROOT} {sys.executable} -m tests.recipes.evolving"  # any host is
    site.write_text(f"{cluster.site.read_text()}SINK_PREFIX=({able})\n")
    options = {"generations": 12, "validation__every": 4}
    words = arguments(inputs, folder, **options)
    job = cluster.submit("evolve.sbatch", words, "--nodes=2", f"--export=ALL,SINK_SITE={site}")
    state = folder / "state.json"
    cluster.wait_until(lambda: state.exists() and len(json.loads(state.read_text())["fitness"]) >= 2, job)
    cluster.command("scancel", "--signal=USR1", job)
    assert int(cluster.finish(job)["Restarts"]) >= 1
    log = cluster.log(job)
    assert "in 2 groups on 2 process(es)" in log
    assert "SIGUSR1" in log
    assert "resuming after generation" in log
    assert f"job {job} is back in the queue" in log
    let_pass(monkeypatch)
    assert run(arguments(inputs, tmp_path / "alone", **options)) == 0
    assert files_of(folder) == files_of(tmp_path / "alone")
