"""`sink-log`: logs what was measured of a run, and missing curves, to wandb and TensorBoard."""

from __future__ import annotations

from dataclasses import replace

from sinkmodel.console import command, say
from sinkmodel.errors import UserError
from sinkmodel.parser import OneLineParser, path_of

DESCRIPTION = """\
Log the results of sink-eval, attention maps, a report and checkpoints to the run's own page in wandb and its
TensorBoard folder, after training or between two jobs. Curves that are missing there, because the run was trained
without the logger or the logger failed, are added from the run's metrics.csv."""
EXAMPLE = """Example:
  sink-log --run runs/sink --results verify.json sinks.json --maps maps --report report"""
TARGETS = ("wandb", "tensorboard")


@command("sink-log")
def main(argv: list[str]) -> None:
    parser = OneLineParser("sink-log", DESCRIPTION, EXAMPLE)
    parser.add_argument("--run", required=True, type=path_of, help="the run folder of sink-pretrain")
    parser.add_argument("--to", nargs="+", choices=TARGETS, help="where to log (default: as the run was trained)")
    parser.add_argument(
        "--results", nargs="+", type=path_of, default=[], metavar="FILE", help="result files of sink-eval … --json"
    )
    parser.add_argument(
        "--maps",
        nargs="+",
        type=path_of,
        default=[],
        metavar="FOLDER",
        help="folders of sink-eval sinks --maps, with different names",
    )
    parser.add_argument("--report", type=path_of, metavar="FOLDER", help="the folder of sink-eval report; wandb only")
    parser.add_argument("--checkpoints", action="store_true", help="keep the checkpoints as artifacts; wandb only")
    options = parser.parse_args(argv)
    if not (options.run / "config.yaml").is_file():
        raise UserError(f"{options.run} has no config.yaml; give the folder of a run of sink-pretrain")
    from recipes.config import load_config
    from recipes.training.logs.measured import read_measured
    from recipes.training.settings import PretrainConfig
    from sinkmodel.checkpoint import Recipe, checkpoint_steps, read_checkpoint, read_metrics
    from sinkmodel.locks import locked
    from sinkmodel.sink_metric import OLD_DEFINITION, old_columns

    config = load_config(PretrainConfig, [f"--config={options.run / 'config.yaml'}"], DESCRIPTION, EXAMPLE)
    targets = options.to or [name for name in TARGETS if getattr(config.logging, name)]
    if not targets:
        raise UserError(f"{options.run} was trained with neither wandb nor TensorBoard; name one with --to")
    if targets == ["tensorboard"] and (options.report or options.checkpoints):
        raise UserError("--report and --checkpoints are for wandb; TensorBoard has no place for them")
    logging = replace(config.logging, wandb="wandb" in targets, tensorboard="tensorboard" in targets)
    steps = checkpoint_steps(options.run)
    if not steps:
        raise UserError(f"{options.run} has no checkpoint yet; run sink-log after its first checkpoint")
    config = replace(config, logging=logging)
    measured = read_measured(options.results, options.maps, options.report, steps if options.checkpoints else {})
    from recipes.training.logs.build import build_mirrors, refuse_what_is_not_installed, switched_off

    if "wandb" in targets and (off := switched_off()):
        raise UserError(f"{off} switches wandb off, so nothing can be logged there; unset it, or give --to tensorboard")
    refuse_what_is_not_installed(config.logging)
    recipe = Recipe.from_dict(read_checkpoint(steps[max(steps)])["recipe"])
    with locked(options.run):
        metrics = read_metrics(options.run)
        if old := old_columns(metrics[0] if metrics else ()):
            say(f"{' and '.join(old)} of {options.run} have an {OLD_DEFINITION}")
        for mirror in build_mirrors(options.run, config, recipe.provenance, resuming=False):
            mirror.catch_up(metrics)
            mirror.try_to(lambda mirror=mirror: mirror.show(measured), "at what was measured")  # type: ignore[misc]
            mirror.finalize("success")
            if mirror.failed:
                raise UserError(f"{mirror.title} did not get everything; the line above gives the reason", exit_code=1)
            say(f"{mirror.title} has {options.run} up to step {metrics[-1]['step'] if metrics else 0}")


if __name__ == "__main__":
    raise SystemExit(main())
