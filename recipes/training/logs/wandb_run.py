"""Weights & Biases: one wandb run for a run folder, however often it is started, online or offline."""

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
PATIENCE = 60.0  # seconds to wait for the upload at the end of a run; a preempted job has little time


class WandbRun(Mirror):
    """Logs with the optimiser's step as wandb's step, and `tokens` as the x-axis of every curve.

    wandb accepts only steps after the last one that it has. Online its server gives that step. Offline each start
    writes a folder of its own, and the step is read from these (`wandb_files`). So no step is in two folders, and
    `wandb sync` makes one run of all of them.

    Args:
        resuming: whether training resumes from a checkpoint. If it does and wandb cannot log online, it logs offline;
            for a new run that is a UserError.
        last: the last step of the training; a run that ends earlier is shown as preempted.
        config: shown by wandb as the run's config.
        group: the wandb group, shared by twins.
        tags: the wandb tags.
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
        """Log tables, pictures and the report to the run's page, and the files as artifacts, with a version per change.

        They use the next of wandb's steps. If the run resumes later and logs every step, that step's line is lost.
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
        for path in paths:  # policy "immutable": wandb does not copy the file, which may be large
            if path.is_dir():
                for name, file in files_of(path).items():  # add_dir would follow every link
                    artifact.add_file(str(file), name=name, policy="immutable")
            else:
                artifact.add_file(str(path), policy="immutable")
        logged = self._run.log_artifact(artifact, aliases=aliases)
        if not self._run.offline:
            logged.wait()  # uploading a checkpoint may take longer than PATIENCE

    def close(self, status: str) -> None:
        import wandb

        if status == "success" and max(self.step, self.has) < self.last:
            self._run.mark_preempting()  # wandb then shows "preempted" instead of "finished"
            status = "stopped"
        self._run.finish(exit_code=0 if status == "success" else 1)
        wandb.teardown()  # flushes the file in wandb's process; ours may exit through os._exit


def open_run(run: Path, settings: CopySettings, resuming: bool, **more: Any) -> Any:
    """Create or resume the wandb run of a run folder; wandb itself finds its mode, key and server.

    Raises UserError if wandb refuses, unless `resuming`: then the run logs offline.
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
    """The environment variable that switches wandb off, as `NAME=value`; None if there is none."""
    off = {"WANDB_DISABLED": ("1", "on", "yes", "true"), "WANDB_MODE": ("disabled",)}  # as in transformers
    return next((f"{key}={os.environ[key]}" for key in off if os.environ.get(key, "").lower() in off[key]), None)


def check_wandb() -> str:
    """Wandb's mode, or its server's address if online. Raises UserError if it has no key, or its server refuses it."""
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
    except ValueError as error:  # pydantic's, for a setting in the environment that wandb does not have
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
    """The id of a run's wandb run; it is made at the first start and kept in the run folder."""
    path = run / IDENTITY
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:8]})
    return read_json(path)["id"]
