"""Guards: a run that was killed and resumed is the run that was not; what is logged, saved, and said."""

from __future__ import annotations

import math
import random
import signal
import time

import pytest
import torch
import yaml

from recipes.pretrain import main
from recipes.training.logs import read_metrics
from sinkmodel.checkpoint import checkpoint_steps, load_checkpoint
from tests import tiny
from tests.recipes.runs import arguments, assert_same_run, final_state, numbers, start_process, train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.prepared(tmp_path_factory.mktemp("prepared") / "data")


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("undisturbed") / "run")


def wait_for_checkpoint(process, run, at_least: int) -> None:
    while process.poll() is None and max(checkpoint_steps(run), default=-1) < at_least:
        time.sleep(0.01)
    assert process.poll() is None, f"ended before step {at_least}: {process.stderr.read()}"


def test_the_run_learns_and_logs_what_it_did(undisturbed):
    rows = read_metrics(undisturbed / "metrics.csv")
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
        assert 0 < float(row["sink_share"]) < 1
        assert float(row["grad_norm"]) > 0
        assert float(row["tokens_per_second"]) > 0
        assert 0 < float(row["mfu"]) < 1
        assert abs(float(row["twin_loss"]) - float(row["loss"])) < 0.1
    assert sorted(checkpoint_steps(undisturbed)) == [28, 35, 40], "the last three"
    assert yaml.safe_load((undisturbed / "config.yaml").read_text())["sink"] == {"kind": "token", "count": 1}


def test_a_killed_run_resumes_bit_for_bit(data, undisturbed, tmp_path):
    """SIGKILL at three random moments, in the middle of the first epoch and across its end (step 35)."""
    rng = random.Random(1)
    for at_least in (7, 14, 35):
        process = start_process(data, tmp_path / "run")
        wait_for_checkpoint(process, tmp_path / "run", at_least)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.wait()
    train(data, tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)
    assert not list((tmp_path / "run").rglob(".*.part")), "what a kill left half-written is gone"


def test_it_resumes_from_every_checkpoint_and_goes_on_in_another_folder(data, undisturbed, tmp_path):
    for step in (28, 35):
        source = undisturbed / "checkpoints" / f"step{step}.ckpt"
        train(data, tmp_path / f"from{step}", resume=source)
        a, b = final_state(tmp_path / f"from{step}"), final_state(undisturbed)
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_workers_and_reading_ahead_change_nothing(data, undisturbed, tmp_path):
    assert_same_run(train(data, tmp_path / "run", data__workers=2), undisturbed)


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_saves_and_says_how_to_resume(data, undisturbed, tmp_path, number, name):
    run = tmp_path / "run"
    process = start_process(data, run, checkpoints__every=2)
    wait_for_checkpoint(process, run, 2)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert f"{name}: saving" in said
    assert f"sink-pretrain --config {run / 'config.yaml'}" in said
    assert "Traceback" not in said
    stopped = max(checkpoint_steps(run))
    assert f"stopped at step {stopped} of 40" in said
    assert main(["--config", str(run / "config.yaml")]) == 0
    assert numbers(run) == numbers(undisturbed)


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
    losses = [float(row["loss"]) for row in read_metrics(run / "metrics.csv") if row["loss"]]
    plain = train(data, tmp_path / "plain", schedule__steps=6)
    expected = [float(row["loss"]) for row in read_metrics(plain / "metrics.csv") if row["loss"]]
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
    capsys.readouterr()
    assert main([str(word) for word in arguments(data, run, schedule__steps=14, checkpoints__every=7)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the loss or gradient of step 9 is not finite" in error
    assert f"the last good checkpoint is {good}" in error
    assert sorted(checkpoint_steps(run)) == [7]


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
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step7.ckpt"]


@pytest.mark.slow
def test_wandb_offline_keeps_one_run_over_a_resume(data, tmp_path):
    run = tmp_path / "run"
    process = start_process(data, run, logging__wandb=True)
    wait_for_checkpoint(process, run, 7)
    process.kill()
    process.wait()
    train(data, run, logging__wandb=True)
    folders = list((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2, "offline, each start has a folder"
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1, "of one run"


def test_bad_input_is_one_line_and_writes_nothing(data, undisturbed, tmp_path, capsys):
    altered = tiny.prepared(tmp_path / "altered")
    shard = altered / "train-00000.bin"
    shard.write_bytes(b"\1\0" + shard.read_bytes()[2:])
    cut = tiny.prepared(tmp_path / "cut")
    (cut / "train-00000.bin").write_bytes(shard.read_bytes()[:-10])
    other_data = tiny.prepared(tmp_path / "other", train_words=3000)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("mine")
    no_checkpoint = tmp_path / "no.ckpt"
    no_checkpoint.write_bytes(b"PK nothing")
    new = tmp_path / "new"
    step35 = undisturbed / "checkpoints" / "step35.ckpt"
    cases = [
        ((altered, new), {}, "train-00000.bin has been altered"),
        ((cut, new), {}, "train-00000.bin is cut short"),
        ((tmp_path / "nowhere", new), {}, "is no folder"),
        ((data, occupied), {}, "already holds something else"),
        ((data, undisturbed), {"optimizer.lr": 1e-3}, "optimizer.lr = 0.003, this one has 0.001"),
        ((data, undisturbed), {"sink.kind": "none"}, "sink.kind = token, this one has none"),
        ((other_data, new), {"resume": step35}, "trained with data fingerprint"),
        ((data, new), {"resume": step35, "model.ffn": 96}, "checkpoint of another shape"),
        ((data, new), {"resume": step35, "sink.kind": "none"}, "was trained with SinkConfig(kind='token'"),
        ((data, new), {"resume": no_checkpoint}, "is not a complete checkpoint"),
        ((data, new), {"model.vocabulary": 300}, "the tokenizer of"),
        ((data, new), {"data.sequence": 128}, "longer than model.positions = 64"),
        ((data, new), {"training.batch_tokens": 500}, "512 would do"),
        ((data, new), {"training.micro_rows": 3}, "training.micro_rows = 2 would do"),
        ((data, new), {"training.device": "cuda"}, "torch sees no GPU"),
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
