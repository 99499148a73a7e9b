"""Guards: what a public project states in several files is the same in all of them."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
from pathlib import Path

import pytest
import tomllib
import yaml

import sinkmodel

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    (version,) = re.findall(rf"^{package}==(\S+)$", read("constraints.txt"), re.MULTILINE)
    return version


def test_the_version_has_one_source():
    """Risk: a release whose parts name different versions."""
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    assert importlib.metadata.version("sinkmodel") == sinkmodel.__version__, "install the project again"
    assert yaml.safe_load(read("CITATION.cff"))["version"] == sinkmodel.__version__
    released = re.search(rf"^## \[{re.escape(sinkmodel.__version__)}\]", read("CHANGELOG.md"), re.MULTILINE)
    assert released or f"This will be {sinkmodel.__version__}" in read("CHANGELOG.md")


@pytest.mark.parametrize("name", [*PROJECT["scripts"], "sink-eval ppl"])
def test_every_command_prints_its_version(name, capsys):
    """Risk: a bug report without a version, or a --version that first asks for everything else."""
    script, *rest = name.split()
    module, _, function = PROJECT["scripts"][script].partition(":")
    with pytest.raises(SystemExit) as end:
        getattr(importlib.import_module(module), function)([*rest, "--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"sinkmodel {sinkmodel.__version__}\n"


def test_pre_commit_has_the_ruff_that_ci_has():
    """Risk: a commit that pre-commit has put in form fails in CI, whose ruff is another."""
    (hooks,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert hooks["rev"] == f"v{pinned('ruff')}"
    assert {hook["id"] for hook in hooks["hooks"]} == {"ruff-check", "ruff-format"}


def test_the_workflow_runs_what_ci_runs():
    """Risk: a pull request is green although .ci/run, the definition of what must hold, was never called."""
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
    assert any(step.get("run") == ".ci/run" for job in jobs.values() for step in job["steps"])
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_citation_has_the_licence_of_the_project():
    """Risk: a citation file that tools cannot read, or with another licence."""
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
