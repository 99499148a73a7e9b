"""The facts about a model, from its folder and from the run that trained it.

This module does not import torch: a card may be written on a machine without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

from sinkmodel.bounds import real
from sinkmodel.errors import UserError, first_line
from sinkmodel.files import read_json
from sinkmodel.secrets import all_redacted
from sinkmodel.sinks import IN_SOFTMAX, SinkConfig, check_record, kind_of, sink_ids_of

# The same names as in sinkmodel.export and sinkmodel.architectures, which would import torch.
PROVENANCE = "training.json"
FIELDS = "decoder"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # keys: names in safetensors
GGUF = ("gpt_neox", "llama", "mistral", "qwen2", "qwen3")  # the same as in sinkmodel.export.gguf_file
# Ends of the names of embeddings: in GPT-NeoX, in Llama and most others, in Falcon.
EMBEDDINGS = (
    *("embed_in.weight", "embed_out.weight", "embed_tokens.weight", "lm_head.weight"),
    "word_embeddings.weight",
)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Keys of the config that all checkpoints of one run have in common.
OF_A_RUN = ("seed", "model", "sink", "optimizer", "schedule")

Point = dict[str, "float | None"]  # a line of metrics.csv


@dataclass(frozen=True)
class Start:
    """The model that training started from, as recorded in training.json."""

    name: str  # a name on the Hub, a package, or the absolute path of a folder or file
    fingerprint: str
    step: int | None
    license: str | None

    @property
    def hub_name(self) -> str | None:
        """The name, if it has the form ORG/NAME of the Hub; else None."""
        return self.name if HUB_NAME.fullmatch(self.name) else None

    @property
    def short(self) -> str:
        """The name without the folders of a path, which are those of a user's machine."""
        return self.name if self.hub_name else PurePath(self.name).name


@dataclass(frozen=True)
class Facts:
    repository: str  # ORG/NAME
    config: dict[str, Any]  # config.json, flat
    training: dict[str, Any]  # training.json: the checkpoint's record of its training
    sink: SinkConfig
    sink_ids: list[int]
    parameters: int
    without_embeddings: int
    dtype: str
    gguf: str | None  # name of a file for llama.cpp in the folder
    points: Sequence[Point] = ()  # lines of the run's metrics.csv, up to this checkpoint

    @property
    def name(self) -> str:
        return self.repository.rpartition("/")[2]

    @property
    def size(self) -> str:
        """Parameters in short: `162.3M`."""
        for letter, unit in (("B", 1e9), ("M", 1e6)):
            if self.parameters >= unit:
                return f"{self.parameters / unit:.1f}{letter}"
        return f"{self.parameters:,}"

    @property
    def in_softmax(self) -> bool:
        return self.sink.kind in IN_SOFTMAX

    @property
    def positions(self) -> int:
        return self.config["max_position_embeddings"]

    @property
    def budget(self) -> int:
        """Budget of the cache in the card's example."""
        return min(1024, max(self.positions // 2, self.kept + 1))

    @property
    def kept(self) -> int:
        """First tokens that the example keeps: the model's sinks; four for a vanilla model, as in the paper."""
        return self.sink.tokens or (0 if self.in_softmax else 4)

    @property
    def steps(self) -> tuple[int, int] | None:
        """(done, planned) optimiser steps."""
        try:
            return int(self.training["step"]), int(self.training["config"]["schedule"]["steps"])
        except (LookupError, TypeError, ValueError):
            return None

    @property
    def complete(self) -> bool:
        return self.steps is not None and self.steps[0] == self.steps[1]

    @property
    def base(self) -> Start | None:
        """The model that training started from; None for a model that was trained from scratch."""
        base = self.training.get("base")
        if not isinstance(base, dict) or not isinstance(base.get("name"), str):
            return None
        step, license = base.get("step"), base.get("license")
        return Start(
            base["name"],
            str(base.get("fingerprint")),
            step if isinstance(step, int) else None,
            license if isinstance(license, str) else None,
        )

    @property
    def parts(self) -> str:
        """Which parts of the base were trained: `all`, `sink` or `sink+norms`."""
        parts = self.training.get("parts")
        return parts if parts in ("sink", "sink+norms") else "all"

    @property
    def tokens_per_parameter(self) -> float | None:
        tokens = self.training.get("tokens")
        return tokens / self.parameters if isinstance(tokens, (int, float)) and self.parameters else None

    @property
    def source(self) -> str | None:
        """The source of the text, as sink-prepare records it: files, or `NAME@COMMIT CONFIG SPLIT` of a data set."""
        data = self.training.get("data")
        source = data.get("source") if isinstance(data, dict) else None
        return source if isinstance(source, str) and source else None

    @property
    def output(self) -> str | None:
        """The run's output folder when it was trained."""
        config = self.training.get("config")
        return config.get("output") if isinstance(config, dict) else None


def gather(folder: Path, repository: str, run: Path | None) -> Facts:
    """Read a model folder (of the weights only names and shapes) and a run's metrics.csv.

    Raises UserError if the folder is not a model folder, or if the run is not the one that trained the model.
    """
    config = _object(folder / "config.json")
    inner = config.pop(FIELDS, {})
    config |= inner if isinstance(inner, dict) else {}
    if not isinstance(config.get("max_position_embeddings"), int):
        raise UserError(f"{folder / 'config.json'} has no max_position_embeddings; give one that sink-export wrote")
    sink, ids = _sink(config.get("sink"), folder)
    training = _object(folder / PROVENANCE)
    total, body, dtype = count_parameters(folder)
    return Facts(
        repository=repository,
        config=config,
        training=training,
        sink=sink,
        sink_ids=ids,
        parameters=total,
        without_embeddings=body,
        dtype=dtype,
        gguf=min((path.name for path in folder.glob("*.gguf") if path.name.isprintable()), default=None),
        points=_points(run, training) if run is not None else (),
    )


def _sink(record: Any, folder: Path) -> tuple[SinkConfig, list[int]]:
    config = SimpleNamespace(sink=record)
    try:
        check_record(config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    ids = sink_ids_of(config)
    return SinkConfig(kind_of(config), len(ids) or 1), ids


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; export the model again with sink-export")
    return all_redacted(content)


def count_parameters(folder: Path) -> tuple[int, int, str]:
    """Number of parameters, number without embeddings, and the most common type. Tied weights are saved once."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no .safetensors file; give a folder that sink-export wrote")
    total = body = 0
    dtypes: dict[str, int] = {}
    for path in files:
        try:
            with safe_open(path, framework="np") as weights:
                for name in weights.keys():  # noqa: SIM118  not a dict
                    piece = weights.get_slice(name)
                    size = math.prod(piece.get_shape())
                    total += size
                    body += 0 if name.endswith(EMBEDDINGS) else size
                    dtypes[piece.get_dtype()] = dtypes.get(piece.get_dtype(), 0) + size
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({first_line(error)}); export the model again") from None
    most = max(dtypes, key=lambda name: dtypes[name], default="")
    return total, body, DTYPES.get(most, most)


# -------------------------------------------------------------------------------------------------------------- the run


def _points(run: Path, training: dict[str, Any]) -> list[Point]:
    """The lines of metrics.csv up to the step of this checkpoint."""
    from sinkmodel.checkpoint import read_metrics

    _check_run(run, training)
    real(run, run / "metrics.csv")  # refuse a link out of the run: the card shows the numbers
    try:
        lines = [{key: _number(text) for key, text in row.items()} for row in read_metrics(run)]
    except (ValueError, TypeError):
        raise UserError(f"{run / 'metrics.csv'} has a value that is not a number; give the run's own folder") from None
    last = training.get("step", math.inf)
    return [line for line in lines if (line.get("step") or 0) <= last]


def _check_run(run: Path, training: dict[str, Any]) -> None:
    import yaml

    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} has no config.yaml; give the folder of a run of sink-pretrain")
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML ({first_line(error)})") from None
    config = training.get("config")
    if not isinstance(saved, dict) or not isinstance(config, dict):
        return
    for key in OF_A_RUN:
        if key in saved and key in config and saved[key] != config[key]:
            raise UserError(f"{run} did not train this model: its {key} differs; give the run that did")


def _number(text: str | None) -> float | None:
    value = float(text) if text else math.nan
    return value if math.isfinite(value) else None
