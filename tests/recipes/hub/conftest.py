"""What tests of sink-push have in common: a Hub of their own each, a model folder, a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from recipes.publish import main
from sinkmodel.export import export
from tests import tiny
from tests.hub import hub

__all__ = ["hub"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Paths are short, and what is written without being asked for is seen."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return export(tiny.checkpoint(folder / "run", "llama"), folder / "model")


@pytest.fixture
def model(exported):
    """A model folder that may be changed."""
    return Path(shutil.copytree(exported, "model"))


@pytest.fixture
def push(capsys):
    """`sink-push` in this process: its exit code, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        return main([str(word) for word in words]), *capsys.readouterr()

    return run
