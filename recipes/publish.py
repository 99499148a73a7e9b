"""`sink-push`: pushes a model folder, a NAMM or a run with its checkpoints to a repository on the Hugging Face Hub."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from recipes.hub.revisions import LIST, MAIN, is_checkpoint, listing
from sinkmodel.checks import choices_of
from sinkmodel.choices import Dtype
from sinkmodel.console import command, put, say
from sinkmodel.errors import UserError
from sinkmodel.hub_token import hub_token
from sinkmodel.parser import OneLineParser, path_of, positive

if TYPE_CHECKING:
    from recipes.hub.folder import CardInput
    from recipes.hub.repository import Repository

DESCRIPTION = """\
Push a model folder, an evolved NAMM, or a run with its checkpoints, to the Hugging Face Hub.

Files that the Hub has already are not sent again: the same command resumes where it was stopped, and does nothing if
nothing has changed. The token is that of `hf auth login` or of HF_TOKEN. The repository's address is printed at the
end."""
EXAMPLE = """example:
  sink-push --model models/sink --repo ORG/NAME
  sink-push --model models/sink-1000 --repo ORG/NAME --revision step1000
  sink-push --model runs/namm/best --repo ORG/NAME
  sink-push --run runs/sink --repo ORG/NAME --every 1000 --follow"""
OF_A_MODEL, OF_A_RUN = ("revision", "tag"), ("every", "follow", "dtype", "workdir")


@command("sink-push")
def main(argv: list[str]) -> None:
    options = parse(argv)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed, if installed, prints to stdout
            lines = push(options)
        put("\n".join(lines))
    except Terminated:
        raise UserError("stopped by SIGTERM; the same command resumes where it was", 128 + signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="sink-push", description=DESCRIPTION, epilog=EXAMPLE)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=path_of, metavar="DIR", help="a folder that sink-export wrote, or sink-evolve")
    what.add_argument("--run", type=path_of, help="a run: its checkpoints as branches step1000 …, the newest on main")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="the repository; created if it is missing")
    parser.add_argument("--private", action="store_true", help="create it private; an existing public one is refused")
    parser.add_argument("--dry-run", action="store_true", help="print what would be pushed, and its size")
    model = parser.add_argument_group("options for --model")
    model.add_argument("--revision", metavar="BRANCH", help="step1000, say, for an early checkpoint (default: main)")
    model.add_argument("--tag", help="a permanent name for what is pushed, such as v1.0")
    run = parser.add_argument_group("options for --run")
    run.add_argument("--every", type=positive, metavar="N", help="push branches of steps divisible by N (default: all)")
    run.add_argument("--follow", action="store_true", help="wait for new checkpoints until the run is complete")
    run.add_argument("--dtype", choices=choices_of(Dtype), help="type of the weights (default: float32)")
    run.add_argument(
        "--workdir", type=path_of, metavar="DIR", help="folder for one export at a time (default: beside the run)"
    )
    card = parser.add_argument_group("the model card")
    card.add_argument("--report", type=path_of, metavar="DIR", help="a folder of sink-eval report to include")
    card.add_argument(
        "--results", type=path_of, nargs="+", default=[], metavar="FILE", help="files of sink-eval --json to include"
    )
    card.add_argument("--no-card", action="store_true", help="keep the README.md of the folder, or else of the Hub")
    options = parser.parse_args(argv)
    for name in OF_A_RUN if options.run is None else OF_A_MODEL:
        if getattr(options, name):
            raise UserError(f"--{name} is for --{'run' if options.run is None else 'model'}; leave it out")
    if options.no_card and (options.report or options.results):
        raise UserError("--report and --results are for the card, which --no-card leaves out; drop one of the two")
    for path in (options.report, *options.results):
        if path is not None and not path.exists():
            raise UserError(f"{path} does not exist; give a file or folder that sink-eval wrote, or leave it out")
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", options.repo):
        raise UserError(f"--repo is {options.repo!r}; give ORG/NAME, or your own user name in place of ORG")
    for name in ("revision", "tag"):
        given = getattr(options, name)
        if given and not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w-][\w.-]*)*", given):
            raise UserError(f"--{name} is {given!r}; use letters, digits, dots and dashes, as in step1000")
    return options


def push(options: argparse.Namespace) -> list[str]:
    """Returns the lines for stdout: the address, or the plan of a dry run."""
    from huggingface_hub.utils import HFValidationError, disable_progress_bars, validate_repo_id

    from recipes.hub.errors import HubAway, as_user_errors
    from recipes.hub.folder import CardInput
    from recipes.hub.repository import Repository, several

    try:
        validate_repo_id(options.repo)
    except HFValidationError as error:
        raise UserError(f"--repo is {options.repo!r}, which the Hub does not accept: {error}") from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    repository = Repository(options.repo)
    card = None if options.no_card else CardInput(options.run, options.report, tuple(options.results))
    one = push_model if options.run is None else push_run
    try:
        with as_user_errors(options.repo):
            if not hub_token() and not options.dry_run:
                raise UserError(
                    f"no token for the Hub: run `hf auth login`, or export HF_TOKEN; it must be allowed to write to "
                    f"{options.repo.partition('/')[0]}"
                )
            lines = one(options, repository, card)
    except HubAway as error:
        raise UserError(f"{error}; {repository.standing()}; the same command resumes from there") from None
    if not options.dry_run:
        done = repository.changed
        say(f"pushed {several(done)}" if done else "nothing has changed, nothing was pushed")
    return lines


def push_model(options: argparse.Namespace, repository: Repository, card: CardInput | None) -> list[str]:
    from recipes.hub.folder import model_files, plan_of
    from recipes.hub.plan import human_size

    branch, folder = options.revision or MAIN, options.model
    model_files(folder)  # fail before any request if it is not a model folder
    seen = repository.can_be_seen() if options.dry_run else repository.exists()
    plan = plan_of(repository, folder, branch, card, seen=seen)
    if options.dry_run:
        lines = [f"{one.path_in_repo}  {human_size(one.upload_info.size)}" for one in plan.add]
        lines += [f"{path}  is removed" for path in plan.delete]
        return [*lines, f"{repository.url(branch)}  {len(plan.add)} files, {human_size(plan.bytes)}"]
    repository.make(options.private)
    tags = repository.tags()
    if branch in tags:
        raise UserError(f"{branch} of {options.repo} is a tag, which is never moved; give another --revision")
    if options.tag in tags and (plan or tags[options.tag] != plan.head.commit):
        raise UserError(f"the tag {options.tag} of {options.repo} names something else; give another --tag")
    repository.carry_out(plan, branch, f"Push {folder.resolve().name}")
    if is_checkpoint(branch):
        listed = repository.plan({LIST: listing(repository.branches())}, MAIN)
        repository.carry_out(listed, MAIN, f"List {branch}")
    if options.tag and options.tag not in tags:
        repository.tag(options.tag, branch)
    return [repository.url(branch)]


def push_run(options: argparse.Namespace, repository: Repository, card: CardInput | None) -> list[str]:
    from recipes.hub.folder import refuse_evolution
    from recipes.hub.runs import RunPush

    refuse_evolution(options.run)
    workdir = options.workdir or options.run.resolve().parent
    run = RunPush(options.run, repository, options.every, options.dtype or "float32", workdir, card)
    if options.dry_run:
        return run.rehearse(seen=repository.can_be_seen())
    if not options.follow:
        run.steps()  # fail before anything is created if there are no checkpoints
    repository.make(options.private)
    run.push(options.follow)
    return [repository.url()]


class Terminated(BaseException):
    """SIGTERM. Not an Exception, so that no handler takes it for a failure of the Hub."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


if __name__ == "__main__":
    raise SystemExit(main())
