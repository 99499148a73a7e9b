"""`sink-evolve`: evolve a memory on a model, without gradients."""

from __future__ import annotations

from recipes.training.processes.launch import launch, run_to_end, several
from recipes.training.processes.signals import noted
from sinkmodel.console import command
from sinkmodel.errors import UserError
from sinkmodel.imports import slow_imports

DESCRIPTION = """\
Evolve a NAMM, the network that decides what a cache forgets, with CMA-ES. To resume a run that was stopped, give the
same command again.

To use N processes on this machine, add --compute.processes N. Under torchrun or srun, start one process per device."""
EXAMPLE = (
    "sink-evolve --model runs/recall --config namm --text books.jsonl.xz --validation-text others.jsonl.xz "
    "--output runs/namm"
)


def main(argv: list[str] | None = None) -> int:
    return run_to_end(run, argv)


@command("sink-evolve")
def run(argv: list[str]) -> int:
    with noted():  # before torch is loaded: a signal may come while a job starts
        from recipes.config import load_config
        from recipes.evolution.settings import EvolveConfig

        failure = None
        try:
            config = load_config(EvolveConfig, argv, DESCRIPTION, EXAMPLE)
        except UserError as error:
            failure = error
            if not several():
                raise
        if several():
            from recipes.training.processes.ranks import agree_on_start

            if failure is not None:
                agree_on_start(failure, 60.0, "cpu")
            agree_on_start(None, config.compute.timeout, config.compute.device)
        elif config.compute.processes is not None and config.compute.processes > 1:
            return launch("recipes.evolve", argv, config.compute.processes)
        with slow_imports():
            from recipes.evolution.run import evolve

        return evolve(config)


if __name__ == "__main__":
    raise SystemExit(main())
