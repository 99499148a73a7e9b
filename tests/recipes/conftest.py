"""What many tests of training read: a small prepared folder, made once a module."""

from __future__ import annotations

import threading

import pytest

from tests import tiny


@pytest.fixture(autouse=True)
def no_watchdog_stays():
    """A watchdog that outlives its run would end this process, with every test to come, `training.timeout` later."""
    yield
    for thread in threading.enumerate():
        if thread.name == "watchdog":
            thread.join(5)
            assert not thread.is_alive(), "a run in this process has ended, its watchdog has not"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.prepared(tmp_path_factory.mktemp("prepared") / "data")
