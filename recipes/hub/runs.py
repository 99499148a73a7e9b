"""Pushes a run's checkpoints as revisions of one repository, named like Pythia's, even while the run trains.

Each checkpoint is a branch `step1000`. `main` has the newest one, and `revisions.txt` with the names of the branches.
When a run is complete, its commit on `main` gets the tag `final-step143000`, which stays even if `main` changes.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.hub.errors import HubAway, as_user_errors
from recipes.hub.folder import CardInput, plan_of
from recipes.hub.plan import human_size
from recipes.hub.repository import Repository
from recipes.hub.revisions import LIST, MAIN, branch_of, final_tag, listing
from sinkmodel.bounds import real
from sinkmodel.checkpoint import Recipe, checkpoint_steps, digest_of, read_checkpoint, weights_of
from sinkmodel.choices import Dtype
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.export import export
from sinkmodel.files import DiskFull
from sinkmodel.locks import LOCK, locked

LOOK = 10.0  # seconds between two checks for a new checkpoint
PATIENCE = 60.0  # seconds until the next try if the Hub cannot be reached


class RunPush:
    """Finds which checkpoints of a run are not on the Hub, exports them one after the other, and pushes them.

    Args:
        every: push branches of the steps divisible by this; None pushes all checkpoints.
        dtype: type of the exported weights.
        workdir: folder for the exports, of which there is one at a time.
        card: inputs of the cards; None writes no cards. Report and results go to the card of the newest checkpoint, on
            `main`.
    """

    def __init__(
        self, run: Path, repository: Repository, every: int | None, dtype: Dtype, workdir: Path, card: CardInput | None
    ):
        self.run, self.repository, self.every, self.dtype, self.card = run, repository, every, dtype, card
        self.workdir = workdir / f".{run.resolve().name}.push"
        self.planned = planned_steps(run)
        self.on_main: int | None = None  # the step that this process has put on main
        self.settled: set[int] = set()  # steps whose branch needs no more work
        self.failed: dict[int, str] = {}

    def steps(self) -> dict[int, Path]:
        """The run's checkpoints by step. Raises UserError if there are none, or one is a link out of the run."""
        if steps := checkpoint_steps(self.run):
            for path in steps.values():
                real(self.run, path)
            return steps
        raise UserError(f"{self.run} holds no checkpoints/step*.ckpt yet; add --follow to wait for them")

    def push(self, follow: bool = False) -> None:
        """Push all checkpoints; with `follow` also new ones, until the run is complete.

        Raises UserError if the Hub refuses, and, after pushing the others, if checkpoints cannot be read.
        """
        try:
            with locked(self.workdir):
                for left_over in self.workdir.iterdir():  # from a push that was killed
                    if left_over.name != LOCK:
                        shutil.rmtree(left_over)
                if not follow:
                    self._push_what_is_there()
                while follow and not self._complete():
                    self._push_patiently()
        finally:
            with contextlib.suppress(OSError):
                self.workdir.rmdir()
        if self.failed:
            failed = "; ".join(f"{branch_of(step)}: {why}" for step, why in self.failed.items())
            raise UserError(f"these were not pushed: {failed}")

    def rehearse(self, seen: bool) -> list[str]:
        """What `push` would do now, one line per revision. If not `seen`, the repository could not be read."""
        steps = self.steps()
        newest, missing = max(steps), sorted(self._missing(steps) if seen else self._wanted(steps))
        lines = [f"{branch_of(step)}  {human_size(size_of_export(steps[step], self.dtype))}" for step in missing]
        if missing or not seen or self._note(steps[newest]) not in self.repository.note(MAIN):
            lines.append(f"{MAIN}  {branch_of(newest)}, and {LIST}")
        if newest == self.planned and not (seen and final_tag(newest) in self.repository.tags()):
            lines.append(f"{final_tag(newest)}  {MAIN}, for good")
        return lines or ["nothing would be pushed"]

    def _wanted(self, steps: Iterable[int]) -> set[int]:
        return {step for step in steps if self.every is None or step % self.every == 0}

    def _complete(self) -> bool:
        return self.planned in (self.on_main, *self.failed)

    def _push_patiently(self) -> None:
        """Push the present checkpoints, then wait for more."""
        steps = set(checkpoint_steps(self.run))
        try:
            with as_user_errors(self.repository.name):
                if steps:
                    self._push_what_is_there()
        except HubAway as error:
            say(f"{error}; trying again in {PATIENCE:.0f} s")
            time.sleep(PATIENCE)
            return
        if not self._complete():
            last = f"the last one is of step {max(steps)}" if steps else "there is none yet"
            say(f"waiting for a checkpoint of {self.run}; {last}")
        while not self._complete() and not set(checkpoint_steps(self.run)) - steps:
            time.sleep(LOOK)

    def _push_what_is_there(self) -> None:
        """Push branches in the order of their steps; then `main`, from the newest checkpoint that can be read."""
        steps = self.steps()
        missing = self._missing(steps)
        for step in sorted(missing - {max(steps)}):
            self._push_step(step, steps[step], branch=True, main=False)
        for step in sorted(steps, reverse=True):
            if step == self.on_main or self._push_step(step, steps[step], branch=step in missing, main=True):
                break
        if self.on_main == self.planned and final_tag(self.planned) not in self.repository.tags():
            self.repository.tag(final_tag(self.planned), MAIN)

    def _missing(self, steps: dict[int, Path]) -> set[int]:
        """Steps whose branch does not exist, or whose newest commit is not from this checkpoint."""
        wanted, branches = self._wanted(steps) - self.settled, self.repository.branches()
        there = {step for step in wanted if branch_of(step) in branches and self._is_from(step, steps[step])}
        if there:
            say(f"{len(there)} of {len(wanted)} checkpoints are on the Hub already")
        self.settled |= there
        return wanted - there

    def _is_from(self, step: int, checkpoint: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):  # the run has just removed it
            return self._note(checkpoint) in self.repository.note(branch_of(step))
        return False

    def _note(self, checkpoint: Path) -> str:
        """The text by which a commit names its source. If a branch has the same note, it has the same files."""
        return f"checkpoint sha256 {digest_of(checkpoint)}, {self.dtype}, sinkmodel {version('sinkmodel')}"

    def _push_step(self, step: int, checkpoint: Path, branch: bool, main: bool) -> bool:
        """Export a checkpoint, push it, and remove the export. Returns whether it could be exported."""
        folder = self.workdir / branch_of(step)
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
            note = self._export(step, checkpoint, folder)
            if note is None:
                return False
            title = f"Step {step} of {self.planned}"
            if branch:
                plan = plan_of(self.repository, folder, branch_of(step), self.card and CardInput(run=self.run))
                self.repository.carry_out(plan, branch_of(step), title, note)
                self.settled.add(step)
            if main:
                beside = {LIST: listing(self.repository.branches())}
                self.repository.carry_out(plan_of(self.repository, folder, MAIN, self.card, beside), MAIN, title, note)
                self.on_main = step
        return True

    def _export(self, step: int, checkpoint: Path, folder: Path) -> str | None:
        """Export, and return the note; None if the checkpoint cannot be read, so that the others are still pushed."""
        say(f"{branch_of(step)}: exporting {checkpoint}")
        try:
            note = self._note(checkpoint)
            export(checkpoint, folder, self.dtype)
            return note
        except DiskFull:
            raise
        except (UserError, FileNotFoundError) as error:
            self.settled.add(step)
            if checkpoint.exists():
                self.failed[step] = str(error)
            say(f"{branch_of(step)} is left out: {error if checkpoint.exists() else 'the run has removed it'}")
            return None


def size_of_export(checkpoint: Path, dtype: str) -> int:
    """Bytes of the exported weights, with tied ones counted once. Config and tokenizer are small in comparison."""
    content = read_checkpoint(checkpoint)
    recipe = Recipe.from_dict(content["recipe"])
    if recipe.parts == "all":
        weights = {weight.data_ptr(): weight.numel() for weight in weights_of(content).values()}
    else:  # the checkpoint holds only what was trained: count the whole model
        fields = dict(recipe.model_config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
        weights = {id(weight): weight.numel() for weight in model.parameters()}
    return sum(weights.values()) * getattr(torch, dtype).itemsize


def planned_steps(run: Path) -> int:
    """Number of steps in the run's config. Raises UserError if the folder is not that of a run."""
    config = run / "config.yaml"
    try:
        return int(yaml.safe_load(real(run, config).read_text(encoding="utf-8"))["schedule"]["steps"])
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError):
        raise UserError(
            f"{config} does not exist, or names no schedule.steps; give the folder that sink-pretrain wrote"
        ) from None
