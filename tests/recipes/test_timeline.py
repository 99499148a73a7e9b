"""Guards: the timeline at the top of trainer.py is what a training step does, in that order."""

from __future__ import annotations

import functools
import re

import pytest
import torch

from recipes.training import trainer
from recipes.training.callbacks.checkpoints import Checkpoints
from recipes.training.callbacks.health import Health
from recipes.training.callbacks.metrics import Metrics, Progress
from recipes.training.callbacks.preemption import StopOnSignal
from recipes.training.callbacks.steps import StepMeans
from recipes.training.callbacks.validation import Validation
from recipes.training.callbacks.watchdog import Watchdog
from recipes.training.module import SinkLanguageModel
from tests.recipes.runs import train

CALLBACKS = (Watchdog, StopOnSignal, StepMeans, Health, Metrics, Progress, Validation, Checkpoints)
HOOKS = (
    *("on_train_batch_start", "training_step", "optimizer_zero_grad"),
    *("backward", "configure_gradient_clipping"),
)
ONCE_A_STEP = ("optimizer_zero_grad", "configure_gradient_clipping", "AdamW.step")


def timeline() -> list[str]:
    """The first word of each line of the timeline."""
    return re.findall(r"^    ([\w.]+)", trainer.__doc__, re.MULTILINE)


@pytest.fixture
def events(monkeypatch):
    """What a training calls, by its name in the timeline; AdamW.step when it returns, since the rest is its closure."""
    called: list[str] = []

    def record(owner, method: str, name: str, after: bool = False) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        def recorded(*args, **kwargs):
            if not after:
                called.append(name)
            result = original(*args, **kwargs)
            if after:
                called.append(name)
            return result

        monkeypatch.setattr(owner, method, recorded)

    for callback in CALLBACKS:
        record(callback, "on_train_batch_end", callback.__name__)
    for hook in HOOKS:
        record(SinkLanguageModel, hook, hook)
    record(torch.optim.AdamW, "step", "AdamW.step", after=True)
    return called


STEPS = {"schedule__steps": 3, "logging__every": 1, "validation__every": 1, "checkpoints__every": 1}


def test_a_step_of_one_micro_batch_is_the_timeline(data, tmp_path, events):
    """Risk: a reader learns an order that Lightning, or a change of ours, does not keep."""
    train(data, tmp_path / "run", training__micro_rows=8, **STEPS)
    assert len(timeline()) == 14
    assert events == timeline() * 3


def test_a_step_of_several_micro_batches_repeats_the_lines_that_it_names(data, tmp_path, events):
    """Risk: the same, for a step that accumulates gradients."""
    train(data, tmp_path / "run", training__micro_rows=4, **STEPS)
    first = [name for name in timeline() if name not in ONCE_A_STEP or name == "optimizer_zero_grad"]
    last = [name for name in timeline() if name != "optimizer_zero_grad"]
    assert events == (first + last) * 3
