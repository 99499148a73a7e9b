"""What many tests of training read: a small prepared folder, made once a module."""

from __future__ import annotations

import pytest

from tests import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.prepared(tmp_path_factory.mktemp("prepared") / "data")
