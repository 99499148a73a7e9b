"""Guards: a file or folder is there whole or not at all, and a full disk is reported in one line."""

from __future__ import annotations

import errno

import pytest
from safetensors import SafetensorError

from sinkmodel.errors import UserError
from sinkmodel.files import DiskFull, atomic_file, atomic_folder, write_json


def test_a_file_appears_when_the_block_ends_well(tmp_path):
    with atomic_file(tmp_path / "a") as aside:
        aside.write_text("new")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def fail_after_writing(path):
    path.write_text("new")
    raise ZeroDivisionError


def test_what_stood_there_stays_when_it_does_not(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "a") as aside:
        fail_after_writing(aside)
    assert (tmp_path / "a").read_text() == "old"
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "folder") as aside:
        fail_after_writing(aside / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_of_somebody_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    with atomic_folder(tmp_path / "folder") as aside:
        (aside / "x").write_text("an empty one may be used")
    with pytest.raises(UserError, match="already holds something else"), atomic_folder(tmp_path / "folder"):
        raise AssertionError("the block must not run")
    assert (tmp_path / "folder" / "x").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        # seen with torch 2.13 and safetensors 0.8 on a small tmpfs
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_said_whoever_writes(tmp_path, error):
    def fill(aside):
        aside.write_text("half")
        raise error

    with (
        pytest.raises(DiskFull, match="the disk is full: .*out could not be written"),
        atomic_file(tmp_path / "out") as aside,
    ):
        fill(aside)
    assert not list(tmp_path.iterdir())


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "out", {1, 2})
    assert not list(tmp_path.iterdir())
