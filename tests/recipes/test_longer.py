"""Risks: a run made longer whose rate jumps, which loses what it had reached, or whose steps are logged twice."""

from __future__ import annotations

import os
import shutil

import pytest
import yaml

from recipes.config import load_config
from recipes.pretrain import main
from recipes.training.run_folder import starting_point
from recipes.training.settings import PretrainConfig
from sinkmodel.checkpoint import Recipe, checkpoint_steps, read_checkpoint, read_metrics, verify
from sinkmodel.errors import UserError
from sinkmodel.loading import load_checkpoint
from tests.recipes.runs import arguments, assert_same_run, train

# Without a warm-up, which is a share of the steps, a shorter run is the beginning of a longer one to the last bit.
WSD = {"schedule__kind": "wsd", "schedule__warmup": 0, "schedule__decay": 0.5, "checkpoints__every": 100}


def config(data, run, **changes: object) -> PretrainConfig:
    return load_config(PretrainConfig, arguments(data, run, **changes), "", "sink-pretrain")


@pytest.fixture(scope="module")
def short(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("wsd") / "short", schedule__steps=10, **WSD)


@pytest.fixture(scope="module")
def cosine(data, tmp_path_factory):
    quick = {"schedule__steps": 8, "checkpoints__every": 4, "schedule__warmup": 0.25}
    return train(data, tmp_path_factory.mktemp("cosine") / "run", **quick)


def test_a_longer_run_is_the_run_that_it_would_have_been(data, short, tmp_path, capsys):
    assert sorted(checkpoint_steps(short)) == [5, 10], "the one before the decay is kept without being asked for"
    identity = short / "checkpoints" / "wandb.json"
    identity.write_text('{"id": "12345678"}')
    assert main([*map(str, arguments(data, short, schedule__steps=16, **WSD)), "--dry-run"]) == 0
    assert "resumes from step5.ckpt" in capsys.readouterr().out
    assert sorted(checkpoint_steps(short)) == [5, 10], "a dry run changes nothing"
    train(data, short, schedule__steps=16, **WSD)
    whole = train(data, tmp_path / "whole", schedule__steps=16, **WSD)
    assert_same_run(short, whole, step=16)

    end = short / "until-step10"
    assert f"the run's checkpoints and numbers after step 5 are kept in {end}" in capsys.readouterr().err
    assert (end / "checkpoints" / "wandb.json").exists()
    assert not identity.exists(), "wandb takes no step twice, so the run gets another page"
    assert list(checkpoint_steps(end)) == [10]
    verify(end / "checkpoints" / "step10.ckpt")
    load_checkpoint(end)
    assert [int(row["step"]) for row in read_metrics(end)][-1] == 10
    assert yaml.safe_load((end / "config.yaml").read_text(encoding="utf-8"))["schedule"]["steps"] == 10

    assert yaml.safe_load((short / "config.yaml").read_text(encoding="utf-8"))["schedule"]["steps"] == 16
    provenance = Recipe.from_dict(read_checkpoint(short / "checkpoints" / "step16.ckpt")["recipe"]).provenance
    assert provenance["config"]["schedule"]["steps"] == 16
    assert [(one["until_step"], one["steps"]) for one in provenance["earlier_schedules"]] == [(5, 10)]


@pytest.mark.slow
def test_killed_while_its_end_is_set_aside_it_ends_the_same(data, tmp_path, monkeypatch):
    """Risk: a kill between two moves loses a checkpoint, or has the run resumed from one of the old schedule."""
    base = train(data, tmp_path / "base", schedule__steps=10, **WSD)
    (base / "checkpoints" / "wandb.json").write_text('{"id": "12345678"}')
    whole = train(data, tmp_path / "whole", schedule__steps=16, **WSD)
    moves = 0
    for moment in range(6):  # the first of them before anything has moved
        run = tmp_path / f"run{moment}"
        shutil.copytree(base, run)
        replace, moves = os.replace, 0

        def kill(source, target, moment=moment, replace=replace):
            nonlocal moves
            if moves == moment:
                raise KeyboardInterrupt
            moves += 1
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", kill)
            assert main([*map(str, arguments(data, run, schedule__steps=16, **WSD))]) == 130
        train(data, run, schedule__steps=16, **WSD)
        assert_same_run(run, whole, step=16)
        end = run / "until-step10"
        assert list(checkpoint_steps(end)) == [10]
        verify(end / "checkpoints" / "step10.ckpt")
        assert (end / "checkpoints" / "wandb.json").exists()


def test_a_constant_rate_is_continued_from_the_last_step(data, tmp_path):
    constant = {**WSD, "schedule__decay": 0}
    run = train(data, tmp_path / "run", schedule__steps=5, **constant)
    assert starting_point(run, config(data, run, schedule__steps=9, **constant)).name == "step5.ckpt"
    train(data, run, schedule__steps=9, **constant)
    assert sorted(checkpoint_steps(run)) == [5, 9]
    assert not list(run.glob("until-*")), "nothing was left behind"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule__steps": 16}, "at step 8 of 8 (cosine); with schedule.steps = 16 (cosine) the learning rate would"),
        (
            {"schedule__steps": 16},
            "jump there from 0.0015 to 0.00256; resume with --schedule.steps 8",
        ),
        ({"schedule__steps": 16}, "a run with schedule.kind wsd can be made longer"),
        ({"schedule__steps": 6}, "has done 8 steps, more than schedule.steps = 6; resume with --schedule.steps 8"),
        ({"schedule__kind": "wsd", "schedule__steps": 16}, "resume with --schedule.kind cosine --schedule.steps 8"),
    ],
)
def test_a_rate_that_would_jump_is_refused_with_both_rates(data, cosine, capsys, changes, message):
    before = {path: path.read_bytes() for path in cosine.rglob("*") if path.is_file()}
    settings = {"checkpoints__every": 4, "schedule__warmup": 0.25, **changes}
    assert main([str(word) for word in arguments(data, cosine, **settings)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert {path: path.read_bytes() for path in cosine.rglob("*") if path.is_file()} == before


def test_a_decay_without_a_checkpoint_before_it_is_refused(data, tmp_path):
    run = train(data, tmp_path / "run", schedule__steps=6, **WSD)
    os.remove(run / "checkpoints" / "step3.ckpt")
    with pytest.raises(UserError, match="there is no checkpoint from before its decay; resume with --schedule.steps 6"):
        starting_point(run, config(data, run, schedule__steps=12, **WSD))


def test_a_shorter_run_does_not_go_back(data, tmp_path):
    """Risk: a mistyped number of steps throws the end of a run away."""
    run = train(data, tmp_path / "run", schedule__steps=8, **WSD)
    with pytest.raises(UserError, match="has done 8 steps, more than schedule.steps = 6"):
        starting_point(run, config(data, run, schedule__steps=6, **WSD))
    assert starting_point(run, config(data, run, schedule__steps=8, **WSD)).name == "step8.ckpt"
