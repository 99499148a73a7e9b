"""The prompts of an evolution for training, validation and statistics: made from texts, seeds and tasks.

Training and validation share neither seeds nor, for tasks that need a text, books. The prompts of tests are made by
`sink-eval longcontext`. Its seeds are plain numbers, so that none of its samples is among these. The user must keep the
books of a test apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from recipes.config import option_of
from recipes.evolution.settings import EvolveConfig
from sinkmodel.errors import UserError
from sinkmodel.files import sha256_of
from sinkmodel.tasks.cells import Cell, made_cell
from sinkmodel.tasks.samples import Setting, Task
from sinkmodel.tasks.text import OwnText, read_own_text

if TYPE_CHECKING:
    from sinkmodel.loading import LoadedModel

Part = Literal["training", "validation", "statistics"]
ONLY_THE_ANSWER = 1  # tokens of room for generation, if nothing is generated: an answer always gets the room it needs


@dataclass(frozen=True)
class Prompts:
    """Makes prompts from the texts of a run.

    Attributes:
        training: text for training prompts and for those of the statistics; None if no task needs one.
        validation: text for validation prompts; None if no task needs one.
        files: SHA-256 of the files by option.
    """

    config: EvolveConfig
    training: OwnText | None
    validation: OwnText | None
    files: dict[str, list[str]]

    def cell(self, loaded: LoadedModel, task: Task, part: Part, count: int, generation: int = 0) -> Cell:
        """`count` prompts of a task. They depend only on the arguments, the seed, the text and the length."""
        text = self.validation if part == "validation" else self.training
        setting = Setting(self.config.tasks.length, 0, text, "--tasks.length")
        room = self.config.tasks.answer_tokens if self.config.fitness.score == "match" else ONLY_THE_ANSWER
        seed = f"{self.config.seed} {part} {generation}"
        try:
            return made_cell(loaded, task, setting, seed, count, room, lambda made: None)
        except UserError as error:
            raise UserError(f"{part} prompts: {error}") from None


def read_prompts(config: EvolveConfig) -> Prompts:
    """Read the texts. Raises UserError if two files have the same content, in one option or in both."""
    texts = {"text": config.texts, "validation_text": config.validation_texts}
    files = {key: [sha256_of(path) for path in paths] for key, paths in texts.items()}
    known: dict[str, tuple[str, Path]] = {}
    for key, paths in texts.items():
        for path, digest in zip(paths, files[key]):
            if digest in known:
                other, where = known[digest]
                raise UserError(
                    f"{option_of(key)} {path} is the same text as {option_of(other)} {where}; give each file once: "
                    "training text cannot be used for validation"
                )
            known[digest] = key, path
    return Prompts(config, _read(config.texts), _read(config.validation_texts), files)


def _read(paths: Sequence[Path]) -> OwnText | None:
    return read_own_text(paths)[0] if paths else None


def check_length(config: EvolveConfig, loaded: LoadedModel) -> None:
    """UserError if prompts are longer than the model's positions, or too short for a single decision."""
    length, sinks = config.tasks.length, len(loaded.sink_ids)
    most = math.inf if loaded.positions is None else loaded.positions
    if length + sinks > most:
        raise UserError(
            f"tasks.length {length} does not fit into the {most} positions of {loaded.name}, {sinks} of them for "
            f"tokens in front of the text; use {most - sinks} or less"
        )
    if config.namm.interval >= length:
        raise UserError(
            f"namm.interval {config.namm.interval} is not below tasks.length {length}: the memory would never decide; "
            "lower the interval or raise the length"
        )
