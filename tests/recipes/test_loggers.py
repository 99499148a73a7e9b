"""Guards: TensorBoard, and any other copy of metrics.csv, has each line once; none is needed, and none stops a run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from recipes.training.logs.build import group_of, tags_of
from recipes.training.logs.mirror import Mirror
from recipes.training.settings import DataSettings, ModelSettings, OptimizerSettings, PretrainConfig
from sinkmodel.checkpoint import checkpoint_steps, read_metrics
from sinkmodel.sinks import SinkConfig
from tests.recipes.logged import expected_points, forget, points
from tests.recipes.runs import arguments, train


class Memory(Mirror):
    title = "memory"

    def __init__(self, has: int = -1, fails_at: int | None = None):
        super().__init__()
        self.has, self.fails_at, self.lines = has, fails_at, []

    def write(self, metrics, step):
        if step == self.fails_at:
            raise ConnectionResetError(104, "Connection reset by peer")
        self.lines.append((step, metrics))

    def show(self, measured):
        raise NotImplementedError

    def close(self, status):
        self.lines.append(status)


def test_a_mirror_takes_the_lines_that_it_lacks_and_no_line_twice():
    lines = [{"step": str(step), "loss": str(step / 8), "val_loss": ""} for step in (5, 10, 15)]
    mirror = Memory(has=10)
    mirror.catch_up(lines)
    mirror.log_metrics({"loss": 2.5}, 20)
    assert mirror.lines == [(15, {"loss": 1.875}), (20, {"loss": 2.5})]
    ahead = Memory(has=20)  # the steps after the checkpoint were logged before the kill
    ahead.catch_up(lines)
    ahead.log_metrics({"loss": 2.5}, 20)
    ahead.log_metrics({"loss": 3.0}, 25)
    assert ahead.lines == [(25, {"loss": 3.0})]


def test_a_mirror_that_fails_is_said_once_and_asked_no_more(capsys):
    mirror = Memory(fails_at=10)
    for step in (5, 10, 15):
        mirror.log_metrics({"loss": 1.0}, step)
    mirror.finalize("success")
    assert mirror.lines == [(5, {"loss": 1.0})]
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("memory failed at step 10 ([Errno 104] Connection reset by peer) and is now disabled;")


def test_twins_share_a_group_and_differ_in_a_tag():
    data = DataSettings(path="/here/data/fineweb-edu")
    vanilla = PretrainConfig(output="runs/vanilla", data=data)
    sink = replace(vanilla, output="runs/sink", sink=SinkConfig("token"))
    assert tags_of(vanilla) == ["sink-none", "gpt_neox-12x768", "fineweb-edu"]
    assert tags_of(sink) == ["sink-token", "gpt_neox-12x768", "fineweb-edu"]
    assert tags_of(replace(sink, sink=SinkConfig("token", 2)))[0] == "sink-token-2"
    group = group_of(vanilla, "f00d")
    assert group.startswith("gpt_neox-12x768-fineweb-edu-")
    elsewhere = replace(sink, data=replace(data, path="/there/fineweb-edu", workers=7))
    assert group_of(sink, "f00d") == group_of(elsewhere, "f00d") == group
    base = ModelSettings(start_from="base")
    twins = [replace(vanilla, model=base), replace(sink, model=replace(base, sink_row="random"))]
    assert group_of(twins[0], "f00d") == group_of(twins[1], "f00d") != group, "how the sink's row starts is of the sink"
    others = [
        group_of(vanilla, "beef"),
        group_of(replace(vanilla, seed=1), "f00d"),
        group_of(replace(vanilla, optimizer=OptimizerSettings(lr=1e-3)), "f00d"),
    ]
    assert len({group, *others}) == 4


@pytest.mark.slow
def test_training_needs_neither_wandb_nor_tensorboard(data, tmp_path):
    """Their packages cannot be imported; a run that asks for one gets an error before anything is written."""
    run = tmp_path / "run"
    words = arguments(data, run, schedule__steps=6)
    program = (
        "import sys\n"
        "for name in ('wandb', 'tensorboard', 'tensorboardX', 'google'): sys.modules[name] = None\n"
        "from recipes.pretrain import main\n"
        f"refused = [main([*{words!r}, f'--logging.{{name}}=true']) for name in ('wandb', 'tensorboard')]\n"
        f"from pathlib import Path; assert not Path({str(run)!r}).exists()\n"
        f"assert (refused, main({words!r})) == ([2, 2], 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for package in ("wandb", "tensorboard"):
        message = f"logging.{package} is true, but {package} is not installed; pip install 'sinkmodel[{package}]'"
        assert f"sink-pretrain: {message}\n" in done.stderr
    assert read_metrics(run)


def test_tensorboard_has_each_step_once_after_a_resume_and_what_was_logged_before_it_was_asked_for(data, tmp_path):
    run = train(data, tmp_path / "run")
    for last in (35, 35):
        forget(run, above=last)
        train(data, run, logging__tensorboard=True)
        assert points(run) == expected_points(run)
        assert len(list((run / "tensorboard").iterdir())) == 1
    assert {"loss", "sink_metric", "val_loss", "mfu", "tokens"} <= points(run).keys()
    assert [step for step, _ in points(run)["loss"]] == list(range(5, 41, 5))


def test_a_disk_that_is_full_ends_tensorboard_and_not_the_run(data, tmp_path, capsys, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "flush", full)
    run = train(data, tmp_path / "run", logging__tensorboard=True, schedule__steps=10)
    lines = [line for line in capsys.readouterr().err.splitlines() if "TensorBoard" in line]
    assert lines == [
        "TensorBoard failed at step 5 ([Errno 28] No space left on device) and is now disabled; metrics.csv has every "
        "line, and sink-log, or a resumed run, adds the missing ones"
    ]
    assert max(checkpoint_steps(run)) == 10
