"""Tests of a GPU. `make test-gpu` runs them there, without tests/conftest.py, which hides it; elsewhere the same tests
are rehearsed with tiny sizes on the CPU (`bench.gpu.machine`)."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["SINKMODEL_PRODUCTS"] = "torch"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

from bench.gpu.machine import need_device


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.path.parts[-2:]:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True, scope="session")
def device():
    """A missing GPU fails every test; nothing is skipped for it."""
    need_device()
