"""Guards: a run that was killed and resumed is the run that was not; what is logged, saved, and printed."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import time

import pytest
import torch
import yaml

from recipes.pretrain import main
from recipes.training.callbacks.checkpoints import Checkpoints
from sinkmodel.checkpoint import checkpoint_steps, read_metrics
from sinkmodel.loading import load_checkpoint
from tests import tiny
from tests.recipes.runs import (
    arguments,
    assert_same_run,
    final_state,
    numbers,
    start_process,
    train,
    wait_for_checkpoint,
)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("undisturbed") / "run")


def test_the_run_learns_and_logs_what_it_did(undisturbed):
    rows = read_metrics(undisturbed)
    trained = [row for row in rows if row["loss"]]
    validated = [row for row in rows if row["val_loss"]]
    assert [int(row["step"]) for row in trained] == list(range(5, 41, 5))
    assert [int(row["step"]) for row in validated] == [10, 20, 30, 40]
    losses = [float(row["loss"]) for row in trained]
    assert losses[0] > 5 > 4.2 > losses[-1]
    assert float(validated[-1]["val_loss"]) < float(validated[0]["val_loss"]) - 0.3
    for row in trained:
        assert float(row["ppl"]) == pytest.approx(math.exp(float(row["loss"])))
        assert int(row["tokens"]) == int(row["step"]) * 512
        assert 0 < float(row["sink_alpha"]) < 1
        assert float(row["grad_norm"]) > 0
        assert float(row["tokens_per_second"]) > 0
        assert 0 < float(row["mfu"]) < 1
        assert abs(float(row["twin_loss"]) - float(row["loss"])) < 0.1
    assert sorted(checkpoint_steps(undisturbed)) == [28, 35, 40], "the last three"
    assert yaml.safe_load((undisturbed / "config.yaml").read_text())["sink"] == {"kind": "token", "count": 1}


def test_a_killed_run_resumes_bit_for_bit(data, tmp_path):
    """SIGKILL at three random moments, in the middle of the first epoch and across its end (step 35).

    The run is long enough that a slow test never finds it finished.
    """
    rng, steps = random.Random(1), 150
    whole = train(data, tmp_path / "whole", schedule__steps=steps)
    for at_least in (7, 14, 35):
        process = start_process(data, tmp_path / "run", schedule__steps=steps)
        wait_for_checkpoint(process, tmp_path / "run", at_least)
        time.sleep(rng.random() * 0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    train(data, tmp_path / "run", schedule__steps=steps)
    assert_same_run(tmp_path / "run", whole, steps)
    assert not list((tmp_path / "run").rglob(".*.part")), "what a kill left half-written is gone"


def test_it_goes_on_from_any_checkpoint_and_past_one_that_is_damaged(data, undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (run / "checkpoints" / "step40.ckpt").unlink()
    damaged = run / "checkpoints" / "step35.ckpt"
    damaged.write_bytes(damaged.read_bytes()[:50_000])
    train(data, run)
    stderr = capsys.readouterr().err
    assert "step35.ckpt is not what was written" in stderr
    assert f"resuming from {run / 'checkpoints' / 'step28.ckpt'}" in stderr
    assert_same_run(run, undisturbed)


def test_a_damaged_checkpoint_of_a_later_step_pushes_no_good_one_out(data, undisturbed, tmp_path, monkeypatch):
    """Risk: with checkpoints.keep 1 it is the newest that stays, and a kill before its step is reached loses all."""
    run, left = tmp_path / "run", []
    shutil.copytree(undisturbed, run)
    for step, path in checkpoint_steps(run).items():
        if step == 35:
            path.write_bytes(path.read_bytes()[:50_000])
        elif step != 28:
            path.unlink()
    remove = Checkpoints._remove_old

    def remove_and_look(self):
        remove(self)
        left.append(list(checkpoint_steps(run)))

    monkeypatch.setattr(Checkpoints, "_remove_old", remove_and_look)
    train(data, run, checkpoints__keep=1, checkpoints__every=3)
    assert left[0] == [30, 35]
    assert left[-1] == [40]


def test_it_goes_on_from_the_newest_checkpoint(data, undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (run / "checkpoints" / "step40.ckpt").unlink()
    train(data, run)
    assert f"resuming from {run / 'checkpoints' / 'step35.ckpt'}" in capsys.readouterr().err
    assert_same_run(run, undisturbed)


def test_a_step_is_logged_and_validated_before_its_checkpoint_is_written(data, tmp_path, monkeypatch):
    """Else a kill in between would lose its lines: a resume does not do the step again."""
    run, save, lines = tmp_path / "run", torch.save, {}

    def look_and_save(content, path):
        rows = read_metrics(run)
        lines[content["global_step"]] = [bool(row["val_loss"]) for row in rows if row["step"] == "10"]
        save(content, path)

    monkeypatch.setattr(torch, "save", look_and_save)
    train(data, run, schedule__steps=12, checkpoints__every=10)
    assert lines == {10: [False, True], 12: [False, True]}


def test_where_no_checkpoint_can_be_read_nothing_is_started_anew(data, undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for path in checkpoint_steps(run).values():
        path.write_bytes(b"PK nothing")
    assert main(arguments(data, run)) == 2
    assert "has checkpoints, but none that can be read" in capsys.readouterr().err
    assert numbers(run) == numbers(undisturbed)


def test_workers_and_reading_ahead_change_nothing(data, undisturbed, tmp_path):
    assert_same_run(train(data, tmp_path / "run", data__workers=2), undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_to_all_its_processes_saves_and_says_how_to_resume(data, undisturbed, tmp_path, number):
    """As a terminal's Ctrl-C, it reaches the workers too."""
    run = tmp_path / "run"
    process = start_process(data, run, checkpoints__every=2, data__workers=2)
    wait_for_checkpoint(process, run, 2)
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert f"{number.name}: saving" in stderr
    assert f"sink-pretrain --config {run / 'config.yaml'}" in stderr
    assert "Traceback" not in stderr
    stopped = max(checkpoint_steps(run))
    assert f"stopped at step {stopped} of 40" in stderr
    assert main(["--config", str(run / "config.yaml")]) == 0
    assert numbers(run) == numbers(undisturbed)


def test_a_second_ctrl_c_ends_at_once(data, tmp_path):
    process = start_process(data, tmp_path / "run", schedule__steps=100_000)
    wait_for_checkpoint(process, tmp_path / "run", 7)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr


def test_one_run_folder_is_for_one_process(data, tmp_path, capsys):
    run = tmp_path / "run"
    process = start_process(data, run, schedule__steps=100_000)
    wait_for_checkpoint(process, run, 7)
    assert main(arguments(data, run, schedule__steps=100_000)) == 2
    assert f" is writing to {run}" in capsys.readouterr().err
    process.kill()
    process.wait()


def test_a_finished_run_is_left_alone(data, undisturbed, capsys):
    before = (undisturbed / "metrics.csv").read_bytes()
    train(data, undisturbed)
    assert "is complete: 40 of 40 steps" in capsys.readouterr().err
    assert (undisturbed / "metrics.csv").read_bytes() == before


def test_twins_start_equal_and_differ_in_the_sink_alone(data, tmp_path):
    quick = {"schedule.steps": 2, "checkpoints.early": True}
    runs = {kind: train(data, tmp_path / kind, sink__kind=kind, **quick) for kind in ("none", "token")}
    none, token = (torch.load(run / "checkpoints" / "step0.ckpt", weights_only=True) for run in runs.values())
    assert none["state_dict"].keys() == token["state_dict"].keys()
    assert all(torch.equal(value, token["state_dict"][name]) for name, value in none["state_dict"].items())
    assert none["TextDataModule"] == token["TextDataModule"], "same data, same order"
    assert load_checkpoint(runs["none"])[2] == []
    assert load_checkpoint(runs["token"])[2] == [tiny.tokenizer().vocabulary]


def test_early_steps_and_multiples_are_kept_for_good(data, tmp_path):
    run = train(
        data,
        tmp_path / "run",
        schedule__steps=13,
        checkpoints__early=True,
        checkpoints__every=3,
        checkpoints__keep_every=6,
        checkpoints__keep=1,
    )
    assert sorted(checkpoint_steps(run)) == [0, 1, 2, 4, 6, 8, 12, 13]


@pytest.mark.slow
def test_compiled_body_gives_the_same_losses_and_names(data, undisturbed, tmp_path):
    run = train(data, tmp_path / "run", training__compile=True, schedule__steps=6)
    losses = [float(row["loss"]) for row in read_metrics(run) if row["loss"]]
    plain = train(data, tmp_path / "plain", schedule__steps=6)
    expected = [float(row["loss"]) for row in read_metrics(plain) if row["loss"]]
    assert losses == pytest.approx(expected, abs=1e-4)
    assert final_state(run, 6).keys() == final_state(plain, 6).keys()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(data, tmp_path, capsys):
    run = tmp_path / "run"
    train(data, run, schedule__steps=14, checkpoints__every=7)
    (run / "checkpoints" / "step14.ckpt").unlink()
    good = run / "checkpoints" / "step7.ckpt"
    poisoned = torch.load(good, weights_only=True)
    poisoned["optimizer_states"][0]["state"][1]["exp_avg"][:] = math.nan  # step 8 makes the weights so, step 9 sees it
    torch.save(poisoned, good)
    (run / "checkpoints" / "SHA256SUMS").unlink()  # which would have distinguished it from what was written
    capsys.readouterr()
    assert main([str(word) for word in arguments(data, run, schedule__steps=14, checkpoints__every=7)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the loss or gradient of step 9 is not finite" in error
    assert f"the last good checkpoint is {good}" in error
    assert sorted(checkpoint_steps(run)) == [7]


def test_weights_that_are_not_finite_are_not_saved(data, tmp_path, capsys):
    run, settings = tmp_path / "run", {"schedule__steps": 14, "checkpoints__every": 1, "checkpoints__keep": 20}
    train(data, run, **settings)
    for step in range(8, 15):
        (run / "checkpoints" / f"step{step}.ckpt").unlink()
    poisoned = torch.load(run / "checkpoints" / "step7.ckpt", weights_only=True)
    poisoned["optimizer_states"][0]["state"][1]["exp_avg"][:] = math.nan
    torch.save(poisoned, run / "checkpoints" / "step7.ckpt")
    (run / "checkpoints" / "SHA256SUMS").unlink()
    assert main(arguments(data, run, **settings)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the weights after step 8 are not finite; it read rows" in error
    assert "step7.ckpt" in error
    assert max(checkpoint_steps(run)) == 7


def test_a_full_disk_is_said_and_the_previous_checkpoint_stays(data, tmp_path, capsys, monkeypatch):
    run, save = tmp_path / "run", torch.save

    def save_until_full(content, path, *args, **kwargs):
        if content["global_step"] >= 14:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save_until_full)
    assert main(arguments(data, run)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the disk is full: step14.ckpt could not be written" in error
    assert f"the last complete checkpoint is {run / 'checkpoints' / 'step7.ckpt'}" in error
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["SHA256SUMS", "step7.ckpt"]


def test_bad_input_is_one_line_and_writes_nothing(data, undisturbed, tmp_path, capsys):
    altered = tiny.prepared(tmp_path / "altered")
    shard = altered / "train-00000.bin"
    shard.write_bytes(b"\1\0" + shard.read_bytes()[2:])
    cut = tiny.prepared(tmp_path / "cut")
    (cut / "train-00000.bin").write_bytes(shard.read_bytes()[:-10])
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("mine")
    new = tmp_path / "new"
    cases = [
        ((altered, new), {}, "train-00000.bin has been altered"),
        ((cut, new), {}, "train-00000.bin is cut short"),
        ((tmp_path / "nowhere", new), {}, "is not a folder"),
        ((data, occupied), {}, "already holds something else"),
        ((data, undisturbed), {"optimizer.lr": 1e-3}, "optimizer.lr = 0.003, this one has 0.001"),
        ((data, undisturbed), {"sink.kind": "none"}, "sink.kind = token, this one has none"),
        ((data, new), {"model.vocabulary": 300}, "the tokenizer of"),
        ((data, new), {"data.sequence": 128}, "longer than model.positions = 64"),
        ((data, new), {"training.batch_tokens": 500}, "512 would do"),
        ((data, new), {"training.micro_rows": 3}, "training.micro_rows = 2 would do"),
        ((data, new), {"training.device": "cuda"}, "torch sees no GPU"),
        ((data, new), {"optimizer.lr": 1e-5}, "schedule.min_lr is 0.0003, not between 0 and optimizer.lr = 1e-05"),
        ((data, new), {"optimizer.lr": 0}, "optimizer.lr is 0.0; it must be above 0"),
        ((data, new), {"data.workers": -1}, "data.workers is -1"),
        ((data, new), {"training.threads": -1}, "training.threads is -1"),
        ((data, new), {"model.rotary_pct": 3}, "model.rotary_pct is 3.0"),
        ((data, new), {"model.vocabulary": 0}, "model.vocabulary is 0"),
        (
            (data, new),
            {"data.sequence": 20_000, "model.positions": 20_000, "training.batch_tokens": 80_000},
            "less than one row of data.sequence",
        ),
    ]
    for (source, output), changes, message in cases:
        assert main([str(word) for word in arguments(source, output, **changes)]) == 2, message
        error = capsys.readouterr().err.splitlines()
        assert message in error[-1]
        assert not any("Traceback" in line for line in error)
        assert not new.exists(), f"nothing is written before the input is known to be right: {message}"
    assert [path.name for path in occupied.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.ffn": 96},
            "dense_4h_to_h.weight has (32, 64), this model expects (32, 96); use the config that",
        ),
        ({"sink.kind": "none"}, "was trained with SinkConfig(kind='token', count=1)"),
        ({"seed": 5}, "trained with data seed 1234, this run has 5"),
        ({"other data": True}, "trained with data fingerprint"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_checkpoint_of_another_run_is_refused(data, undisturbed, tmp_path, capsys, changes, message):
    """Put by hand into the place of this run's own, with this run's config beside it."""
    run = tmp_path / "run"
    changes = dict(changes)
    source = tiny.prepared(tmp_path / "other", train_words=3000) if changes.pop("other data", False) else data
    argv = [str(word) for word in arguments(source, run, **changes)]
    assert main([*argv, "--schedule.steps=1"]) == 0
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("steps: 1\n", "steps: 40\n"))
    shutil.copy(undisturbed / "checkpoints" / "step35.ckpt", run / "checkpoints")
    capsys.readouterr()
    assert main(argv) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert sorted(checkpoint_steps(run)) == [1, 35]
