"""`sink-pretrain`: train a model, with a sink or without, from prepared tokens."""

from __future__ import annotations

import os

from recipes.training.signals import noted
from sinkmodel.console import command
from sinkmodel.errors import UserError

DESCRIPTION = """\
Pre-train a decoder on prepared tokens. A run that was stopped goes on when the same command is given again.

On several devices of this machine: --training.devices N. Under torchrun or srun: the same, a process a device."""
EXAMPLE = "sink-pretrain --config pythia-160m --config sink-token --data.path data/fineweb-edu --output runs/sink"


def main(argv: list[str] | None = None) -> int:
    code = run(argv)
    if _several():
        from recipes.training.ranks import leave

        leave(code)
    return code


@command("sink-pretrain")
def run(argv: list[str]) -> int:
    with noted():  # from here on, before torch is loaded: a signal may come while a job starts
        from recipes.config import load_config
        from recipes.training.settings import PretrainConfig

        failure = None
        try:
            config = load_config(PretrainConfig, argv, DESCRIPTION, EXAMPLE)
        except UserError as error:
            failure = error
            if not _several():
                raise
        if _several():
            from recipes.training.ranks import agree_on_start

            agree_on_start(failure, 60.0 if failure else config.training.timeout)
        elif config.training.devices is not None and config.training.devices > 1:
            from recipes.training.launch import launch

            return launch("recipes.pretrain", argv, config.training.devices)
        from recipes.training.run import pretrain

        return pretrain(config)


def _several() -> bool:
    """Whether torchrun, srun or our own launcher started this process as one of several."""
    return max(int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")) > 1


if __name__ == "__main__":
    raise SystemExit(main())
