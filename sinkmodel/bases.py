"""Existing models as the base of a run: their fingerprint, rows for sinks, and the weights that a run changes.

A run that trains all weights needs its base only once. A run that trains a few (`PARTS`) keeps only those in its
checkpoints. `overlay` puts them onto the base again, and the fingerprint shows whether the base is still the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sinkmodel.errors import UserError
from sinkmodel.shapes import PARTS
from sinkmodel.sinks import is_ours

SINK_ROWS = "sink_rows"  # the parameter of `SinkEmbedding` in a checkpoint
# Settings of a generation config that choose tokens. transformers does not save DRAWING without do_sample.
DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
SAMPLING = (
    *("do_sample", "repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens"),
    *DRAWING,
)
MULTIPLE = 64  # a grown embedding has a multiple of this many rows


@dataclass(frozen=True)
class Base:
    """The model that a run started from.

    Args:
        name: the name for `load_model`; a file or folder by its absolute path.
        fingerprint: SHA-256 of its weights in fp32, before rows for the sink were added.
        step: the step of the checkpoint, if it was a run of ours; else None.
        license: as the model states it; None if it does not.
    """

    name: str
    fingerprint: str
    step: int | None = None
    license: str | None = None


def weights_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and numbers of all weights in fp32, independent of the files that held them."""
    digest = hashlib.sha256()
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in sorted(model.state_dict().items()):
        key = (tensor.data_ptr(), tensor.shape)
        if key in seen:  # a tied head
            continue
        seen.add(key)
        numbers = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(numbers.numpy().data)
    return digest.hexdigest()


def generation_of(model: PreTrainedModel) -> dict[str, Any]:
    """The base's generation settings: the ids that end a text (`eos_token_id`, a list) and its SAMPLING.

    Empty for a model of ours without settings of its own: then transformers derived the config from defaults.
    """
    config = model.generation_config
    if getattr(config, "_from_model_config", False) and is_ours(model.config):
        return {}
    settings = {name: getattr(config, name, None) for name in SAMPLING}
    unused = () if config.do_sample else DRAWING
    settings = {name: value for name, value in settings.items() if value is not None and name not in unused}
    if is_ours(model.config):  # an export wrote the list; ours is built again
        settings.pop("suppress_tokens", None)
    ends = config.eos_token_id
    if ends is not None:
        settings["eos_token_id"] = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    return settings


# ------------------------------------------------------------------------------------------------- a row for the sink


@torch.no_grad()
def grow(model: PreTrainedModel, text_vocabulary: int, sinks: int) -> None:
    """Add embedding rows, if necessary, for ids up to `text_vocabulary + sinks - 1`.

    Embedding and head grow to a multiple of MULTIPLE rows; a tied head stays tied. The new rows of both are the mean of
    the text's rows, so that these ids get hardly any probability.
    """
    rows = model.get_input_embeddings().num_embeddings
    needed = text_vocabulary + sinks
    if needed > rows:
        model.resize_token_embeddings(-(-needed // MULTIPLE) * MULTIPLE, mean_resizing=False)
        for table in _tables(model):
            table[rows:] = table[: min(rows, text_vocabulary)].mean(0)


@torch.no_grad()
def start_rows(
    model: PreTrainedModel, first: int, sinks: int, start: str | None, front: Sequence[int] = (), seed: int = 0
) -> None:
    """Set the embedding rows of the sinks, ids `first` to `first + sinks - 1`, before they are trained.

    Args:
        first: id of the first sink, which is also the number of the text's rows.
        start: `mean` of the text's rows, `bos` (the row of `front`, or of the config's bos_token_id), or `random`
            numbers with the standard deviation of the text's rows. None: `bos` if there is a `front`, else `mean`.
        front: the model's own ids that stood in front of every text until now, such as `<s>`.
        seed: random seed for `random`.

    Raises UserError for `bos` if there is no such token.
    """
    weight = model.get_input_embeddings().weight
    text_VD, place = weight[:first], slice(first, first + sinks)
    start = start or ("bos" if front else "mean")
    if start == "mean":
        weight[place] = text_VD.mean(0)
    elif start == "random":
        generator = torch.Generator().manual_seed(seed)
        weight[place] = torch.randn(sinks, weight.shape[1], generator=generator).to(weight) * text_VD.std()
    else:
        bos = front[0] if front else model.config.get_text_config().bos_token_id
        if not isinstance(bos, int) or not 0 <= bos < first:
            raise UserError(
                "model.sink_row is bos, but the model in model.start_from has no token at the beginning of a text; "
                "choose mean or random"
            )
        weight[place] = weight[bos].clone()


def _tables(model: PreTrainedModel) -> list[Tensor]:
    """The tensors with one row per vocabulary id: embedding, head, the head's bias."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = {id(embedding.weight): embedding.weight, id(head.weight): head.weight}
    if getattr(head, "bias", None) is not None:
        tables[id(head.bias)] = head.bias
    return [table.data for table in tables.values()]


# ----------------------------------------------------------------------------------------------- what a run may change


class SinkEmbedding(nn.Module):
    """A frozen embedding with trained rows for the sinks.

    Args:
        table: the model's own embedding, [V, D]. If it scales its rows, as Gemma's does, ours are scaled too.
        first: id of the first sink.
        sinks: S. Their rows are a parameter `sink_rows` [S, D], so no gradient of the whole table is computed.
    """

    def __init__(self, table: nn.Embedding, first: int, sinks: int):
        super().__init__()
        self.table, self.first = table, first
        self.sink_rows = nn.Parameter(table.weight.detach()[first : first + sinks].clone())

    @property
    def weight(self) -> Tensor:
        """The table's weight, in which the sinks' rows still have their initial values."""
        return self.table.weight

    @property
    def num_embeddings(self) -> int:
        return self.table.num_embeddings

    def forward(self, ids_BT: Tensor) -> Tensor:
        rows = getattr(self.table, "embed_scale", 1.0) * self.sink_rows
        place_BT = ids_BT - self.first
        is_sink_BT = (place_BT >= 0) & (place_BT < len(rows))
        ours = nn.functional.embedding(place_BT.clamp(0, len(rows) - 1), rows)
        return torch.where(is_sink_BT[..., None], ours.to(self.table.weight.dtype), self.table(ids_BT))


def freeze(model: PreTrainedModel, parts: str, first: int, sinks: int) -> SinkEmbedding | None:
    """Make only `parts` trainable. Unless it is `all`, the sinks' rows move into the returned `SinkEmbedding`."""
    assert parts in PARTS
    if parts == "all":
        model.requires_grad_(True)
        return None
    model.requires_grad_(False)
    if parts == "sink+norms":
        norms = _norms(model)
        for name, parameter in model.named_parameters():
            if name in norms:
                parameter.requires_grad_(True)
    embedding = SinkEmbedding(model.get_input_embeddings(), first, sinks)
    model.set_input_embeddings(embedding)
    return embedding


def _norms(model: nn.Module) -> set[str]:
    """Names of the parameters of all normalisation layers, LayerNorm or RMSNorm, of any architecture."""
    return {
        f"{place}.{name}"
        for place, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }


@torch.no_grad()
def overlay(model: PreTrainedModel, changed: Mapping[str, Tensor], first: int) -> None:
    """Put the weights that a run changed onto its base: `SINK_ROWS` from id `first` on, others by their names.

    Raises KeyError or RuntimeError if the model has no such weight, or one of another shape.
    """
    parameters = dict(model.named_parameters())
    for name, value in changed.items():
        if name.endswith(f".{SINK_ROWS}"):
            model.get_input_embeddings().weight[first : first + len(value)] = value
        else:
            parameters[name].copy_(value)


def card_license(card: str) -> str | None:
    """The `license` in the metadata of a model card; None if it has none."""
    front = re.match(r"\A---\r?\n(.*?)^---", card, re.DOTALL | re.MULTILINE)
    found = re.search(r"^license:[ \t]*([\w.-]+)[ \t]*$", front[1], re.MULTILINE) if front else None
    return found[1] if found else None
