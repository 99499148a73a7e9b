"""What a run is made of before its first step. `sink-pretrain` and its dry run both prepare a run here.

So the dry run finds every error in data, tokenizer, base, batch, folder and checkpoint that the run would find.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from recipes.config import flatten
from recipes.data.datamodule import BatchPlan, TextDataModule, plan_batches
from recipes.data.shards import TokenSplit
from recipes.training.base import (
    OpenBase,
    Start,
    build_start,
    check_before_loading,
    check_unchanged,
    moments_of,
    open_base,
    settle,
)
from recipes.training.inputs import build_datamodule, open_data, open_tokenizer
from recipes.training.processes.ranks import World, agree, from_first, refuse_unequal
from recipes.training.run_folder import check_checkpoint, check_folder, starting_point
from recipes.training.settings import PretrainConfig


@dataclass(frozen=True)
class Setup:
    """A run before its first step. Nothing is written yet.

    Args:
        config: the config, with everything filled in that the base decides.
        train: the split that is trained on.
        plan: rows and micro-batches of each process.
        begin: the model before the first step of the run, and what it starts from.
        moments: the optimiser's state in `optimizer.start_from`; see `base.moments_of`.
        base: the model in `model.start_from`; None if there is none.
    """

    config: PretrainConfig
    train: TokenSplit
    plan: BatchPlan
    begin: Start
    datamodule: TextDataModule
    moments: dict[int, dict[str, torch.Tensor]] | None
    base: OpenBase | None

    @property
    def run(self) -> Path:
        return Path(self.config.output)

    def starting_point(self) -> Path | None:
        """The checkpoint to resume from; None for a new run. Raises UserError if no checkpoint there can be used."""
        return from_first(lambda: starting_point(self.run, self.config))

    def check(self, start: Path | None) -> None:
        """Raises UserError if the run cannot be resumed from the checkpoint `start`."""
        if start is not None:
            agree(lambda: check_unchanged(self.base, start))
            agree(lambda: check_checkpoint(start, self.begin.model, self.datamodule, self.config.sink))


def set_up(config: PretrainConfig, world: World, verify: str) -> Setup:
    """Open data, tokenizer and base, build model and batches, and check that they fit each other and the run folder.

    Every process of the run calls this. Raises UserError on all of them.

    Args:
        world: the processes that share a batch, and the place of this one.
        verify: how the token shards are checked; see `data.verify`.
    """
    train, validation = agree(lambda: open_data(config, verify))
    check_before_loading(config, world)
    base = agree(lambda: open_base(config))
    settled = agree(lambda: settle(config, base, train))
    _refuse_unequal_ranks(settled, train, base)
    text = open_tokenizer(settled, train)
    training = settled.training
    plan = plan_batches(training.batch_tokens, settled.data.sequence, training.micro_rows, world.size)
    from_first(lambda: check_folder(Path(settled.output), settled))
    if training.threads:
        torch.set_num_threads(training.threads)
    begin = agree(lambda: build_start(settled, base, text))
    datamodule = agree(lambda: build_datamodule(settled, train, validation, begin.front, plan))
    moments = agree(lambda: moments_of(settled, base, begin.model))
    return Setup(settled, train, plan, begin, datamodule, moments, base)


def _refuse_unequal_ranks(config: PretrainConfig, train: TokenSplit, base: OpenBase | None) -> None:
    """UserError if ranks differ. Only the path of the data, how it is checked, and threads may differ between nodes."""
    of_a_node = ("data.path", "data.verify", "training.threads")
    common = {key: value for key, value in flatten(config).items() if key not in of_a_node}
    refuse_unequal(
        {
            **common,
            "the fingerprint of the data": train.fingerprint,
            "the fingerprint of model.start_from": None if base is None else base.record.fingerprint,
            "the version of torch": torch.__version__,
        },
        "start all of them with the same command, the same files and the same environment",
    )
