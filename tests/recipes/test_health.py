"""Guards: a spike is distinguished from noise and named with its rows; a loss that is not finite stops the run."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch

from recipes.training.callbacks.health import Health, RunningLoss
from sinkmodel.errors import UserError


def test_a_loss_far_above_its_running_mean_is_a_spike_and_does_not_move_it():
    rng, running = random.Random(0), RunningLoss()
    for step in range(300):
        assert not running.spike(5 - step / 100 + rng.gauss(0, 0.05), deviations=6), step
    before = running.mean
    assert before == pytest.approx(2.25, abs=0.6)
    assert running.spike(9.0, deviations=6)
    assert running.mean == before
    assert running.steps == 301


def test_the_first_steps_are_no_spikes_however_they_jump():
    running = RunningLoss()
    assert not any(running.spike(loss, deviations=6) for loss in [1.0, 1.0, 50.0, 1.0] * 20)


def test_mean_and_variance_are_those_of_the_losses():
    """While few steps are seen every one of them weighs the same."""
    running, losses = RunningLoss(), [3.0, 5.0, 4.0, 8.0]
    for loss in losses:
        running.spike(loss, deviations=6)
    assert running.mean == pytest.approx(5.0)
    assert running.variance == pytest.approx(3.5), "population variance"


@pytest.fixture
def health(tmp_path):
    means = SimpleNamespace(losses=torch.zeros(2), grad_norm=torch.tensor(1.0))
    health = Health(tmp_path, means, rows_of=lambda step: [10 * step, 10 * step + 1], spike=6.0)
    health.trainer = SimpleNamespace(global_step=0, is_global_zero=True, accumulate_grad_batches=1)
    return health


def steps(health, losses, norms=None):
    for i, loss in enumerate(losses):
        health.trainer.global_step += 1
        health.means.losses = torch.tensor([loss, loss])
        health.means.grad_norm = torch.tensor(norms[i] if norms else 1.0)
        health.on_train_batch_end(health.trainer, None, None, None, 0)


def test_a_spike_goes_into_a_file_with_its_rows_and_a_resume_drops_what_comes_again(health, tmp_path, capsys):
    steps(health, [3.0 + 0.01 * (i % 3) for i in range(120)])
    health.look(health.trainer)
    steps(health, [3.0, 7.5, 3.0])
    health.look(health.trainer)
    line = "step 122: the loss jumped to 7.500 from about 3.010; it read rows 1220, 1221"
    assert line in capsys.readouterr().err
    text = (tmp_path / "spikes.csv").read_text()
    assert text.splitlines()[0] == "step,loss,expected,rows"
    assert text.splitlines()[1].startswith("122,7.5,3.0")
    assert text.endswith(",1220 1221\n")
    for resumed, kept in ((122, 2), (121, 1)):
        health.trainer.global_step = resumed
        health.on_train_start(health.trainer, None)
        assert len((tmp_path / "spikes.csv").read_text().splitlines()) == kept


def test_its_state_makes_a_resumed_run_see_the_same_spikes(health):
    steps(health, [3.0 + 0.01 * (i % 3) for i in range(120)])
    health.look(health.trainer)
    other = Health(health.run, health.means, health.rows_of, 6.0)
    other.load_state_dict(health.state_dict())
    assert other.running == health.running
    assert other.running.steps == 120


@pytest.mark.parametrize(("losses", "norms"), [([3.0, math.nan, 3.0], None), ([3.0] * 3, [1.0, math.inf, 1.0])])
def test_the_first_step_that_is_not_finite_is_named_with_its_rows_and_the_checkpoint_before(
    health, tmp_path, losses, norms
):
    (tmp_path / "checkpoints").mkdir()
    for step in (0, 1, 2, 3):
        (tmp_path / "checkpoints" / f"step{step}.ckpt").touch()
    steps(health, losses, norms)
    with pytest.raises(UserError, match=r"step 2 is not finite; it read rows 20, 21; .*step1\.ckpt") as raised:
        health.look(health.trainer)
    assert raised.value.exit_code == 1
