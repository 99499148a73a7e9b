"""Names by which a reader of many runs finds twins: a group that they share, and tags in which they differ."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from recipes.config import flatten
from recipes.training.run_folder import FREE_GROUPS, FREE_TO_CHANGE
from recipes.training.settings import PretrainConfig
from sinkmodel.sinks import SinkConfig

OF_A_BASE = {  # keys for an existing model, with their values if there is none
    **dict.fromkeys(("step", "model.start_from", "data.skip", "optimizer.start_from")),
    "training.parts": "all",
}
WHERE = 24  # letters of a data folder's name; wandb takes 64 for a tag


def tags_of(config: PretrainConfig) -> list[str]:
    """Sink, model and data, as in `["sink-token", "gpt_neox-12x768", "fineweb-edu"]`."""
    return [_sink(config.sink), _shape(config), _data(config)]


def group_of(config: PretrainConfig, fingerprint: str) -> str:
    """`gpt_neox-12x768-fineweb-edu-1a2b3c4d`; the digits are a hash of all that decides the run except its sink.

    Args:
        fingerprint: that of the data, so that the folder's path does not matter.
    """
    deciding = {
        key: value
        for key, value in flatten(config).items()
        if key not in FREE_TO_CHANGE
        and not key.startswith((*FREE_GROUPS, "sink.", "model.sink_row"))
        and not (key in OF_A_BASE and OF_A_BASE[key] == value)  # so that runs of earlier versions stay in their groups
    }
    digest = hashlib.sha256(json.dumps([fingerprint, deciding], sort_keys=True).encode()).hexdigest()
    return f"{_shape(config)}-{_data(config)}-{digest[:8]}"


def _sink(sink: SinkConfig) -> str:
    return f"sink-{sink.kind}" + (f"-{sink.count}" if sink.tokens > 1 else "")


def _shape(config: PretrainConfig) -> str:
    return f"{config.model.architecture}-{config.model.layers}x{config.model.hidden}"


def _data(config: PretrainConfig) -> str:
    return Path(config.data.path).absolute().name[:WHERE]
