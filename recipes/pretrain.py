"""`sink-pretrain`: train a model, with a sink or without, from prepared tokens."""

from __future__ import annotations

from sinkmodel.console import command


@command("sink-pretrain")
def main(argv: list[str]) -> int:
    from recipes.config import load_config
    from recipes.training.settings import PretrainConfig

    config = load_config(
        PretrainConfig,
        argv,
        "Pre-train a decoder on prepared tokens. A run that was stopped goes on when the same command is given again.",
        "sink-pretrain --config pythia-160m --config sink-token --data.path data/fineweb-edu --output runs/sink",
    )
    from recipes.training.run import pretrain

    return pretrain(config)


if __name__ == "__main__":
    raise SystemExit(main())
