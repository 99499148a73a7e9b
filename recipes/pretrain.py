"""`sink-pretrain`: train a model, with a sink or without, from prepared tokens."""

from __future__ import annotations

from recipes.training.processes.launch import launch, run_to_end, several
from recipes.training.processes.signals import noted
from sinkmodel.console import command
from sinkmodel.errors import UserError
from sinkmodel.imports import slow_imports

DESCRIPTION = """\
Pre-train a decoder on prepared tokens. To resume a run that was stopped, give the same command again.

To use N devices of this machine, add --training.devices N. Under torchrun or srun, start one process per device.

--dry-run, or --dry-run=N for N processes, checks config, data, batch and disk space, estimates the time, and exits."""
EXAMPLE = "sink-pretrain --config pythia-160m --config sink-token --data.path data/fineweb-edu --output runs/sink"


def main(argv: list[str] | None = None) -> int:
    return run_to_end(run, argv)


@command("sink-pretrain")
def run(argv: list[str]) -> int:
    with noted():  # before torch is loaded: a signal may come while a job starts
        from recipes.config import load_config
        from recipes.training.settings import PretrainConfig

        argv, processes = _dry_run(argv)
        failure = None
        try:
            config = load_config(PretrainConfig, argv, DESCRIPTION, EXAMPLE)
        except UserError as error:
            failure = error
            if processes is not None or not several():
                raise
        if processes is not None:
            with slow_imports():
                from recipes.training.dry_run import dry_run

            return dry_run(config, processes or config.training.devices or 1)
        if several():
            from recipes.training.processes.ranks import agree_on_start

            if failure is not None:
                agree_on_start(failure, 60.0, "cpu")
            agree_on_start(None, config.training.timeout, config.training.device)
        elif config.training.devices is not None and config.training.devices > 1:
            return launch("recipes.pretrain", argv, config.training.devices)
        with slow_imports():
            from recipes.training.run import pretrain

        return pretrain(config)


def _dry_run(argv: list[str]) -> tuple[list[str], int | None]:
    """The other words, and the number of processes to check for: None without --dry-run, 0 if it has no number."""
    others = [word for word in argv if word.partition("=")[0] != "--dry-run"]
    if len(others) == len(argv):
        return argv, None
    given = next(word for word in argv if word not in others).partition("=")[2]
    if given and not (given.isdigit() and int(given) > 0):
        raise UserError(f"--dry-run={given}: give the number of processes that the job will have, as in --dry-run=8")
    return others, int(given or 0)


if __name__ == "__main__":
    raise SystemExit(main())
