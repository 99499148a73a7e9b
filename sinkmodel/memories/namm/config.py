"""`NAMMConfig`, and an evolved NAMM as a folder: `config.json` and `namm.safetensors`.

`config.json` holds the fields of `NAMMConfig`, the format's name and version, and a checksum of the statistics and the
settings that they depend on. `namm.safetensors` holds the network's tensors, and the same checksum as metadata. So
statistics that were altered, or that belong to another network, are refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sinkmodel.errors import UserError, first_line
from sinkmodel.memories.arguments import whole
from sinkmodel.memories.namm.network import flatten, layout, parameter_count, split

FORMAT, VERSION = "sinkmodel-namm", 1
CONFIG, WEIGHTS = "config.json", "namm.safetensors"
SHIPPED = Path(__file__).parent / "evolved"  # artefacts that come with this package, each a folder
MEASURED_WITH = ("gamma", "window", "hop", "interval")  # the settings that the statistics depend on


@dataclass(frozen=True)
class NAMMConfig:
    """The settings of a NAMM, without its parameters. Defaults are the paper's (appendix A).

    Args:
        gamma: γ, the decay of the spectrogram per token.
        window: tokens of a frame; the spectrogram has window / 2 + 1 bins. A multiple of hop.
        hop: tokens from one frame to the next.
        interval: tokens between two decisions; a multiple of hop.
        age_size: number of sines and cosines that encode a token's age; an even number.
        age_base: the slowest of these has a period of almost 2π · age_base tokens.
        hidden: size of the attention head.
        mean: mean of each bin over all layers, heads and tokens, measured once with a network that keeps everything.
        variance: variance of each bin, likewise. If both are empty, they are not measured yet, and the spectrogram is
            not normalised.
        evolved_on: the conditions of the evolution, as JSON: host, tasks, stages.
        seeds: random seeds of the evolution.
        fitness: fitness of the parameters at the end of the evolution.
        commit: commit of the code that evolved them.

    Raises:
        UserError: for settings that do not fit together.
    """

    gamma: float = 0.99
    window: int = 32
    hop: int = 16
    interval: int = 512
    age_size: int = 8
    age_base: float = 50000.0
    hidden: int = 32
    mean: tuple[float, ...] = ()
    variance: tuple[float, ...] = ()
    evolved_on: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    fitness: float | None = None
    commit: str | None = None

    def __post_init__(self) -> None:
        for name in ("window", "hop", "interval", "age_size", "hidden"):
            whole(getattr(self, name), name, 1)
        for name in ("mean", "variance", "seeds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not 0 < self.gamma < 1:
            raise UserError(f"gamma is {self.gamma}; make it more than 0 and less than 1")
        if self.window % 2 or self.age_size % 2:
            raise UserError(f"window {self.window} and age_size {self.age_size} must both be even")
        for name in ("window", "interval"):
            if getattr(self, name) % self.hop:
                raise UserError(
                    f"hop {self.hop} does not divide {name} {getattr(self, name)}; make {name} a multiple of hop"
                )
        numbers = len(self.mean), len(self.variance)
        if numbers not in ((0, 0), (self.bins, self.bins)):
            raise UserError(
                f"the statistics have {numbers[0]} means and {numbers[1]} variances, and the spectrogram has "
                f"{self.bins} bins; give one of each for every bin"
            )
        if not all(map(math.isfinite, (*self.mean, *self.variance))) or min(self.variance, default=0) < 0:
            raise UserError("the statistics have numbers that are not finite, or variances below 0; measure them again")

    @property
    def bins(self) -> int:
        """Number of frequencies of the spectrogram."""
        return self.window // 2 + 1

    @property
    def features(self) -> int:
        """Number of features of each token: the code of its age, then its spectrum."""
        return self.age_size + self.bins

    @property
    def parameters(self) -> int:
        """Length of the flat vector of parameters; 4,172 with the paper's sizes."""
        return parameter_count(self.features, self.hidden)

    @property
    def statistics_sha256(self) -> str:
        """Checksum of the statistics and of the settings that they were measured with."""
        content = {name: getattr(self, name) for name in (*MEASURED_WITH, "mean", "variance")}
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def replace(self, **changes: Any) -> NAMMConfig:
        """A copy with some fields changed. Statistics stay, even if a setting that they depend on changes."""
        return dataclasses.replace(self, **changes)


def write_artefact(folder: str | Path, config: NAMMConfig, parameters: Tensor) -> None:
    """Write `config.json` and `namm.safetensors` to a new folder, atomically.

    Args:
        parameters: one flat vector, [config.parameters].

    Raises UserError if the folder is not empty, if the statistics were not measured, or for several networks.
    """
    from sinkmodel.files import atomic_folder

    if not config.mean:
        raise UserError("this NAMM has no statistics; measure them with measure_statistics before it is evolved")
    check_parameters(config, parameters)
    if parameters.dim() != 1:
        raise UserError(f"parameters for {len(parameters)} rows are not one network; save a single candidate")
    about = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(config)}
    about["statistics_sha256"] = config.statistics_sha256
    tensors = {
        name: x.contiguous().cpu().float() for name, x in split(parameters, config.features, config.hidden).items()
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "statistics_sha256": config.statistics_sha256}
    with atomic_folder(Path(folder)) as aside:
        (aside / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, aside / WEIGHTS, metadata)


def read_artefact(name: str | Path, revision: str | None = None) -> tuple[NAMMConfig, Tensor]:
    """The config and the flat parameters of an artefact.

    Args:
        name: a folder, an artefact that comes with this package (`namm-recall`), or a repository on the Hub.
        revision: a branch, tag or commit of the repository; None: its main branch.

    Raises UserError if there is no artefact, or if it is damaged, of another version, or has altered statistics.
    """
    folder = _folder_of(str(name), revision)
    config, sha256 = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({first_line(error)}); copy it again") from None
    for found in (sha256, metadata.get("statistics_sha256")):
        if found != config.statistics_sha256:
            raise UserError(
                f"{folder / CONFIG} has statistics or settings other than those that this NAMM was evolved with; "
                "copy the artefact again"
            )
    shapes = layout(config.features, config.hidden)
    if {key: tuple(x.shape) for key, x in tensors.items()} != shapes:
        raise UserError(f"{path} does not hold the network of its {CONFIG}; copy the artefact again")
    parameters = flatten(tensors)
    check_parameters(config, parameters)
    return config, parameters


def check_parameters(config: NAMMConfig, parameters: Tensor) -> None:
    """Raise UserError unless these are one flat vector of parameters, or one per row."""
    if parameters.dim() not in (1, 2) or parameters.shape[-1] != config.parameters:
        raise UserError(
            f"parameters are {list(parameters.shape)}; this NAMM takes [{config.parameters}], or [rows, "
            f"{config.parameters}] for one network per row"
        )
    if not bool(torch.isfinite(parameters).all()):
        raise UserError("parameters contain NaN or infinity; perhaps the evolution diverged")


def _read_config(path: Path) -> tuple[NAMMConfig, str | None]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        found = about.get("format"), about.get("version")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as JSON ({first_line(error)}); give the folder of a NAMM") from None
    if found[0] != FORMAT:
        raise UserError(f"{path} is not the config of a NAMM; give a folder that sink-evolve wrote")
    if found[1] != VERSION:
        raise UserError(f"{path} has version {found[1]} of the format, this program reads {VERSION}; update the older")
    names = {each.name for each in dataclasses.fields(NAMMConfig)}
    try:
        config = NAMMConfig(**{key: value for key, value in about.items() if key in names})
    except TypeError as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); copy it again") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config, about.get("statistics_sha256")


def _folder_of(name: str, revision: str | None) -> Path:
    from sinkmodel.names import find_model

    path = Path(name)
    if path.is_dir():
        if revision is not None:
            raise UserError(f"{name} is a folder, which has no revision {revision}; leave it out, or give a Hub name")
        return path
    shipped = sorted(each.parent.name for each in SHIPPED.glob(f"*/{CONFIG}"))
    if name in shipped:
        if revision is not None:
            raise UserError(f"{name} comes with this package and has no revision {revision}; leave it out")
        return SHIPPED / name
    if find_model(name)[0] != "hub":
        raise UserError(
            f"{name} is not a folder with a NAMM; give one that has {CONFIG} and {WEIGHTS}, a Hub name, or "
            f"{' or '.join(shipped)}, which comes with this package"
        )
    return _of_hub(name, revision)


def _of_hub(name: str, revision: str | None) -> Path:
    import huggingface_hub

    from sinkmodel.hub_token import hub_token

    hub_token()  # raises if the token is malformed
    try:
        folder = Path(huggingface_hub.hf_hub_download(name, CONFIG, revision=revision)).parent
        # The cache names this folder after the commit, so that both files are of the same one.
        huggingface_hub.hf_hub_download(name, WEIGHTS, revision=folder.name)
    except Exception as error:  # no network, no such repository, or no such file
        at = "" if revision is None else f" at revision {revision}"
        raise UserError(
            f"{name} is neither a folder nor a reachable Hub repository with a NAMM{at} ({first_line(error)}); "
            "check the name or download it first"
        ) from None
    return folder
