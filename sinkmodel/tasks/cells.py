"""The cells of a command: each task at each length, with samples in the tokens of a model, as long as fits.

A sample has the largest haystack with which its prompt and the room for its answer take at most --length tokens. The
model's own sink tokens are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

from sinkmodel.errors import UserError
from sinkmodel.tasks.samples import CONTAINED, Metric, Sample, Setting, Task
from sinkmodel.tasks.tokens import Reading, in_tokens, prompt_size

if TYPE_CHECKING:
    from sinkmodel.loading import LoadedModel

FLOOR_SCORE = 0.5  # a model can do a task if a full cache scores at least this …
FLOOR_GAIN = 1.0  # … or if the context lowers the answer's loss by so many nats per token

OnSample = Callable[[int], None]  # called with the number of samples made since the last call


@dataclass(frozen=True)
class Cell:
    """A task at a length, with the samples that every memory reads."""

    task: str
    length: int
    metric: Metric
    readings: Sequence[Reading]


def made_cell(
    loaded: LoadedModel,
    task: Task,
    setting: Setting,
    seed: int | str,
    samples: int,
    answer_tokens: int | None,
    on_sample: OnSample,
) -> Cell:
    """The cell of a task whose samples are generated.

    Args:
        samples: number of samples.
        answer_tokens: number of tokens that may be generated; None for the task's own number.
        on_sample: called after each sample with 1.
    """
    room = answer_tokens or task.room
    readings = []
    for number in range(samples):
        readings.append(in_tokens(loaded, make_sample(loaded, task, setting, seed, number, room), room))
        on_sample(1)
    return Cell(task.name, setting.length, CONTAINED, readings)


def make_sample(loaded: LoadedModel, task: Task, setting: Setting, seed: int | str, number: int, room: int) -> Sample:
    """Sample `number` of a task. It depends only on the seed, the task, the number, the setting and the model.

    Raises UserError if --length is too short for the task, or the user's own text too short for --length.
    """

    def build(units: int, setting: Setting = setting) -> Sample:
        return task.build(Random(f"{seed} {task.name} {number}"), units, setting)

    most = task.most(setting)
    if most is not None and most < task.least:
        raise _too_little_text(task, setting)
    units, tokens = fit(lambda units: prompt_size(loaded, build(units), room), setting.length, task.least, most)
    if units < task.least:
        needed = setting.length
        while tokens > needed:  # some prompts grow with --length
            needed = tokens
            tokens = prompt_size(loaded, build(task.least, replace(setting, length=needed)), room)
        raise UserError(
            f"{setting.option} {setting.length} is too short for {task.name}, whose shortest prompt and answer take "
            f"{needed} tokens; use {setting.option} {needed} or more, or leave the task out"
        )
    if units == most:
        raise _too_little_text(task, setting)
    return build(units)


def _too_little_text(task: Task, setting: Setting) -> UserError:
    remedy = f"give a longer text or lower {setting.option}" if task.needs_text else f"lower {setting.option}"
    return UserError(f"{task.name} runs out of text at {setting.option} {setting.length}; {remedy}")


def fit(size: Callable[[int], int], limit: int, least: int, most: int | None = None) -> tuple[int, int]:
    """The largest n from `least` to `most` whose size(n) is at most `limit`, and its size; (least − 1, size) if none.

    Sizes grow almost in proportion to n, so few calls are needed.
    """
    smallest = size(least)
    if smallest > limit:
        return least - 1, smallest
    low, size_low = least, smallest
    high = None if most is None else most + 1  # the smallest n that is known not to fit
    while high is None or high - low > 1:
        slope = (size_low - smallest) / (low - least) if size_low > smallest else 1.0 * smallest
        guess = low + max(1, int((limit - size_low) / slope))
        if high is not None and guess >= high:
            guess = (low + high) // 2
        if (found := size(guess)) <= limit:
            low, size_low = guess, found
        else:
            high = guess
    return low, size_low
