"""Guards: a checkpoint is what the step was, however long it takes to write; complete with its checksum, or absent."""

from __future__ import annotations

import subprocess
import threading

import pytest
import torch

from recipes.training.callbacks.checkpoints import BackgroundCheckpointIO
from sinkmodel.checkpoint import MANIFEST, checkpoint_steps, verify
from sinkmodel.errors import UserError
from sinkmodel.files import DiskFull
from tests import tiny
from tests.recipes.runs import train


@pytest.fixture
def slow_disk(monkeypatch):
    """Writing waits until the test lets it continue."""
    save, go = torch.save, threading.Event()

    def wait_and_save(content, path):
        assert go.wait(30)
        save(content, path)

    monkeypatch.setattr(torch, "save", wait_and_save)
    return go


def test_training_goes_on_while_the_file_of_the_step_is_written(tmp_path, slow_disk):
    writer, weight = BackgroundCheckpointIO(), torch.zeros(3)
    path = tmp_path / "run" / "checkpoints" / "step1.ckpt"
    writer.save_checkpoint({"state_dict": {"w": weight}, "list": [weight]}, path)
    weight += 1  # the next step
    assert not path.exists()
    slow_disk.set()
    writer.finish()
    saved = torch.load(path, weights_only=True)
    assert saved["state_dict"]["w"].tolist() == [0, 0, 0]
    assert saved["list"][0].tolist() == [0, 0, 0]


def test_old_checkpoints_go_when_the_new_one_is_complete_and_not_before(tmp_path, slow_disk):
    writer, run = BackgroundCheckpointIO(), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    old = run / "checkpoints" / "step1.ckpt"
    old.touch()
    writer.afterwards = old.unlink
    writer.save_checkpoint({}, run / "checkpoints" / "step2.ckpt")
    assert old.exists()
    slow_disk.set()
    writer.finish()
    assert list(checkpoint_steps(run)) == [2]


def test_a_save_waits_for_the_one_before(tmp_path, slow_disk):
    writer, folder = BackgroundCheckpointIO(), tmp_path / "run" / "checkpoints"
    writer.save_checkpoint({}, folder / "step1.ckpt")
    second = threading.Thread(target=writer.save_checkpoint, args=({}, folder / "step2.ckpt"))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    slow_disk.set()
    second.join(30)
    writer.finish()
    assert list(checkpoint_steps(tmp_path / "run")) == [1, 2]


def test_what_went_wrong_while_writing_is_raised_once(tmp_path, monkeypatch):
    def full(content, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    writer = BackgroundCheckpointIO()
    writer.save_checkpoint({}, tmp_path / "run" / "checkpoints" / "step1.ckpt")
    writer.save_checkpoint({}, tmp_path / "run" / "checkpoints" / "step2.ckpt")
    assert writer.failed, "kept until all ranks can learn of it"
    with pytest.raises(DiskFull, match=r"step1\.ckpt could not be written to .*; there is no earlier checkpoint"):
        writer.finish()
    writer.finish()
    assert not writer.failed


def test_the_manifest_is_what_sha256sum_reads_and_names_what_is_there(tmp_path):
    data = tiny.prepared(tmp_path / "data")
    run = train(data, tmp_path / "run", schedule__steps=30, checkpoints__every=5)
    folder = run / "checkpoints"
    names = [line.split("  ")[1] for line in (folder / MANIFEST).read_text().splitlines()]
    assert sorted(names) == ["step20.ckpt", "step25.ckpt", "step30.ckpt"]
    done = subprocess.run(["sha256sum", "--check", "--strict", MANIFEST], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == 3


def test_one_changed_byte_is_noticed(tmp_path):
    writer, path = BackgroundCheckpointIO(), tmp_path / "run" / "checkpoints" / "step1.ckpt"
    writer.save_checkpoint({"w": torch.arange(1000)}, path)
    writer.finish()
    verify(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="step1.ckpt is not what was written"):
        verify(path)
    (path.parent / MANIFEST).unlink()
    verify(path)  # one that somebody brought from elsewhere
