"""Weights & Biases: one wandb run for a run folder, however often it is started, online or from offline folders."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from recipes.training.logs.measured import Measured
from recipes.training.logs.mirror import Mirror
from recipes.training.logs.wandb_files import last_step, mend
from recipes.training.settings import CopySettings
from sinkmodel.bounds import files_of
from sinkmodel.console import say
from sinkmodel.errors import UserError, first_line, shell
from sinkmodel.files import read_json, write_json
from sinkmodel.secrets import redacted

IDENTITY = Path("checkpoints") / "wandb.json"
PATIENCE = 60.0  # seconds that the end of a run waits for an upload; a job that goes back to the queue has few


class WandbRun(Mirror):
    """Logs under the optimiser's step, which is wandb's own, with `tokens` as the axis of every curve.

    wandb takes no step behind the last that it has. Online the server says which one that is. Offline nobody does, and
    each start writes a folder of its own: here they are read (`wandb_files`), so that no step is in two of them, and
    `wandb sync` makes one run out of all.

    Args:
        resuming: whether training goes on from a checkpoint. It then goes on without a server, too, logging offline;
            a first start that cannot log raises UserError.
        config: what wandb shows as the run's config.
        last: the last step of the training; a run that ends before it was stopped.
    """

    title = "wandb"

    def __init__(
        self,
        run: Path,
        settings: CopySettings,
        resuming: bool,
        last: int,
        config: dict[str, Any],
        group: str,
        tags: list[str],
    ):
        super().__init__()
        self.last, self.step = last, 0
        identity = identity_of(run)
        mend(run, identity)
        on_disk = last_step(run, identity)
        self._run = open_run(run, settings, resuming, config=config, group=group, tags=tags)
        self.has = on_disk if self._run.offline else self._run.starting_step - 1
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")

    def write(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)
        self.step = step

    def show(self, measured: Measured) -> None:
        """Tables, pictures and the report in the run's page; the files as artifacts, a version each time they change.

        They take one of wandb's steps, the next. A run that goes on later and logs every step goes without that line.
        """
        import wandb

        shown: dict[str, Any] = {
            result.title: wandb.Table(columns=result.columns, data=result.rows) for result in measured.results
        }
        shown |= {f"maps/{folder.name}": wandb.Image(str(folder / "maps.png")) for folder in measured.maps}
        if measured.report is not None:
            shown["report"] = wandb.Html((measured.report / "report.html").read_text(encoding="utf-8"))
            self._keep("report", "report", [measured.report])
        if shown:
            self._run.log(shown, step=max(self.step, self.has) + 1)
        for result in measured.results:
            if result.verdict:
                self._run.summary.update({"verdict": result.verdict})
        if measured.results:
            self._keep("results", "evaluation", [result.path for result in measured.results])
        for step, path in measured.checkpoints.items():
            self._keep("checkpoint", "model", [path], [f"step{step}"])

    def _keep(self, what: str, kind: str, paths: list[Path], aliases: list[str] | None = None) -> None:
        import wandb

        artifact = wandb.Artifact(f"{self._run.id}-{what}", kind)
        for path in paths:  # immutable: not copied first, and a checkpoint is large
            if path.is_dir():
                for name, file in files_of(path).items():  # add_dir would follow every link
                    artifact.add_file(str(file), name=name, policy="immutable")
            else:
                artifact.add_file(str(path), policy="immutable")
        logged = self._run.log_artifact(artifact, aliases=aliases)
        if not self._run.offline:
            logged.wait()  # longer than PATIENCE, for checkpoints

    def close(self, status: str) -> None:
        import wandb

        if status == "success" and max(self.step, self.has) < self.last:
            self._run.mark_preempting()  # shown as "preempted", not as finished
            status = "stopped"
        self._run.finish(exit_code=0 if status == "success" else 1)
        wandb.teardown()  # its process writes the last of the file only now, and ours may end without ceremony


def open_run(run: Path, settings: CopySettings, resuming: bool, **more: Any) -> Any:
    """The wandb run of a run folder, made or gone on with; how and where (WANDB_MODE, key, server) is wandb's to know.

    Raises UserError where wandb does not let us in, unless `resuming`.
    """
    import wandb

    words = {
        "project": settings.project,
        "name": settings.name or run.absolute().name,
        "id": identity_of(run),
        "resume": "allow",
        "dir": run,
        "settings": wandb.Settings(quiet=True, finish_timeout=PATIENCE),
        **more,
    }
    try:
        check_wandb()
        opened = _init(words)
    except UserError as error:
        if not resuming:
            raise
        say(f"{error}; this start logs offline")
        opened = _init({**words, "mode": "offline"})
    if opened.offline:
        say(f"wandb is offline; upload later with: {shell('wandb', 'sync', run / 'wandb')}/offline-run-*")
    elif opened.url:
        say(f"wandb: {opened.url}")
    return opened


def switched_off() -> str | None:
    """The environment variable that switches wandb off, with its value; None without one."""
    off = {"WANDB_DISABLED": ("1", "on", "yes", "true"), "WANDB_MODE": ("disabled",)}  # as transformers reads them
    return next((f"{key}={os.environ[key]}" for key in off if os.environ.get(key, "").lower() in off[key]), None)


def check_wandb() -> str:
    """Where wandb will log, in words. Raises UserError where it has no key, or its server does not take it."""
    import wandb

    try:
        settings = wandb.setup(settings=wandb.Settings(quiet=True)).settings
        if settings.mode != "online":
            return settings.mode
        if wandb.login(prompt=False):
            return redacted(settings.base_url)
        raise _refusal(f"there is no key for {settings.base_url}")
    except (wandb.errors.Error, OSError) as error:
        raise _refusal(first_line(error)) from None
    except ValueError as error:  # of pydantic: a setting in the environment that wandb does not have
        lines = str(error).partition("For further information")[0].splitlines()[1:]
        raise _refusal(" ".join(" ".join(lines).split())) from None


def _init(words: dict[str, Any]) -> Any:
    import wandb

    try:
        return wandb.init(**words)
    except (wandb.errors.Error, OSError) as error:
        raise _refusal(first_line(error)) from None


def _refusal(what: str) -> UserError:
    return UserError(
        f"wandb cannot be used: {what}; run wandb login, set WANDB_MODE=offline to upload later, or leave "
        "logging.wandb out"
    )


def identity_of(run: Path) -> str:
    """The id of a run's wandb run, the same over every start."""
    path = run / IDENTITY
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:8]})
    return read_json(path)["id"]
