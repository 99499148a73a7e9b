"""One thread, no network, no stray accelerator: tests give the same bits on every machine."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["SINKMODEL_PRODUCTS"] = "torch"  # not what is faster on this machine
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("REHEARSE", "1")  # tests/gpu have a GPU under make test-gpu alone, which does not read this file
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Slow tests first, and so the files with slow ones: a long file at the end would keep one process waiting."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def shared_models_are_left_alone():
    yield
    if models := sys.modules.get("tests.models"):
        models.check_shared_models()
