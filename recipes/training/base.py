"""The model that a run starts from: random weights of a shape, or an existing model that gets room for a sink."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from recipes.data.shards import TokenSplit
from recipes.training.inputs import vocabulary_rows
from recipes.training.memory import parameters_of, refuse_too_little_memory
from recipes.training.optimizer import parameter_groups
from recipes.training.processes.ranks import World, agree, from_first
from recipes.training.schedule import ScheduleSettings
from recipes.training.settings import ModelSettings, PretrainConfig
from sinkmodel.bases import Base, SinkEmbedding, freeze, generation_of, grow, start_rows
from sinkmodel.checkpoint import Recipe, checkpoint_steps, find_checkpoint, read_checkpoint
from sinkmodel.errors import UserError
from sinkmodel.loading import LoadedModel, check_base, load_base
from sinkmodel.models import build_model
from sinkmodel.provenance import read_provenance
from sinkmodel.shapes import ModelShape
from sinkmodel.sinks import IN_SOFTMAX, is_ours, kind_of, sink_ids_of, write_sink
from sinkmodel.text_tokenizer import same_tokenizer
from sinkmodel.tokenizer import TextTokenizer
from sinkmodel.tokenizer_loading import load_text_tokenizer
from sinkmodel.trainable import check_trainable, refuse_by_config, silence_dropout

# If the base is not a run that trained the same parts. Norms trained at the row's rate would ruin the model.
UNKNOWN_LR = 5e-5
FROZEN_LR = {"sink": 2e-2, "sink+norms": 1e-3}


@dataclass(frozen=True)
class OpenBase:
    """The model in `model.start_from`, as loaded."""

    loaded: LoadedModel
    text: TextTokenizer
    record: Base
    provenance: Mapping[str, Any]  # empty unless the model is a run of ours or its export

    @property
    def ours(self) -> bool:
        return is_ours(self.loaded.model.config)


@dataclass(frozen=True)
class Start:
    """The model of a run before its first step.

    Args:
        text: the data's tokenizer, with the base's chat template and, without sinks, the tokens in `front`.
        front: token ids in front of every row: the sinks, or those that the base has always had there.
        base: None for a model with random weights.
        embedding: the embedding of a frozen model, which holds the trained rows; None if all weights are trained.
        generation: the base's settings for generation; see `bases.generation_of`.
    """

    model: PreTrainedModel
    text: TextTokenizer
    front: list[int]
    base: Base | None = None
    embedding: SinkEmbedding | None = None
    generation: dict[str, Any] | None = None


def check_before_loading(config: PretrainConfig, world: World) -> None:
    """Check what can be known of the model in `model.start_from` without its weights. Every process calls this.

    Memory is checked before any process loads the model, since it takes what the others would see as free.

    Raises UserError if its config shows that it cannot be trained here, or if memory is too small for it.
    """
    name = config.model.start_from
    if name is None:
        return
    from_first(lambda: refuse_by_config(name))
    count = from_first(lambda: parameters_of(name, config.step))
    agree(lambda: refuse_too_little_memory(config, count, world))


def open_base(config: PretrainConfig) -> OpenBase | None:
    """Load the model in `model.start_from`; None if the config names none.

    Raises UserError if there is no such model, or if it cannot be trained here.
    """
    name = config.model.start_from
    if name is None:
        return None
    loaded, record = load_base(name, config.step)
    check_trainable(loaded.model, name, config.data.sequence)
    silence_dropout(loaded.model)
    return OpenBase(loaded, load_text_tokenizer(name), record, read_provenance(name, config.step))


def settle(config: PretrainConfig, base: OpenBase | None, train: TokenSplit) -> PretrainConfig:
    """The config with everything filled in that depends on the base: shape, learning rate, rows to skip.

    Raises UserError for keys that contradict the base.
    """
    if base is None:
        return config
    lr = config.optimizer.lr
    if lr is None:
        parts = config.training.parts
        lr = _last_rate(base, parts) or FROZEN_LR.get(parts, UNKNOWN_LR)
    min_lr = lr / 10 if config.schedule.min_lr is None else config.schedule.min_lr
    skip = _rows_read(config, base, train) if config.data.skip is None else config.data.skip
    settled = replace(
        config,
        step=base.record.step,  # recorded even if not given: the run in model.start_from may be trained further
        model=_shape_of(config.model, base),
        optimizer=replace(config.optimizer, lr=lr),
        schedule=replace(config.schedule, min_lr=min_lr),
        data=replace(config.data, skip=skip),
    )
    settled.check_positions()
    return settled


def build_start(config: PretrainConfig, base: OpenBase | None, text: TextTokenizer) -> Start:
    """The model in fp32 on the CPU. It depends on config, base and tokenizer alone, so that twins start equal.

    Raises UserError if the data was prepared with another tokenizer than the base's, or if the sinks do not fit it.
    """
    sink, sink_ids = config.sink, config.sink.ids(text.vocabulary)
    if base is None:
        model = build_model(config.model, vocabulary_rows(config, text.vocabulary), config.seed, sink)
        write_sink(model.config, sink, sink_ids)
        return Start(model, text, sink_ids)
    model, generation = base.loaded.model.train(), generation_of(base.loaded.model)
    if difference := same_tokenizer(text, base.text):
        raise UserError(
            f"{config.data.path} was prepared with another tokenizer than that of {base.record.name}: {difference}; "
            f"prepare it with --tokenizer {base.record.name}"
        )
    _check_sink(config, base, text)
    text = replace(text, chat_template=base.text.chat_template)
    before = [] if base.ours else base.loaded.sink_ids
    grow(model, text.vocabulary, max(1, sink.tokens))  # a vanilla model too, so that twins have the same shape
    if sink.kind == "token" and not (base.ours and kind_of(model.config) == "token"):
        start_rows(model, text.vocabulary, sink.tokens, config.model.sink_row, before, config.seed)
    embedding = freeze(model, config.training.parts, text.vocabulary, sink.tokens)
    if sink.kind == "none" and before:
        return Start(model, replace(text, front=tuple(before)), before, base.record, embedding, generation)
    write_sink(model.config, sink, sink_ids)
    return Start(model, text, sink_ids, base.record, embedding, generation)


def _check_sink(config: PretrainConfig, base: OpenBase, text: TextTokenizer) -> None:
    """UserError if the base has a different sink, which cannot be removed, or would have to get one in its softmax."""
    have, want = kind_of(base.loaded.model.config), config.sink.kind
    ids, wanted = sink_ids_of(base.loaded.model.config), config.sink.ids(text.vocabulary)
    name = base.record.name
    if have in IN_SOFTMAX and config.training.parts != "all":
        raise UserError(
            f"{name} has a sink of kind {have}, which is not a row of the embedding, and training.parts "
            f"{config.training.parts} needs sinks of kind token; start from another model, or set training.parts to all"
        )
    if have != want and (have != "none" or want in IN_SOFTMAX):
        raise UserError(
            f"{name} has a sink of kind {have}, this run has sink.kind {want}; an existing model can only get sinks "
            f"of kind token, and keeps the sink that it has: set sink.kind to {'token' if have == 'none' else have}"
        )
    if have == "token" and ids != wanted:
        raise UserError(f"{name} has {len(ids)} sinks, this run has {len(wanted)}; set sink.count to {len(ids)}")
    if have == "token" and config.model.sink_row is not None:
        raise UserError(f"{name} has a trained sink, and its training continues; leave model.sink_row out")


# -------------------------------------------------------------------------------------- settings that the base decides


def _shape_of(asked: ModelSettings, base: OpenBase) -> ModelSettings:
    """The base's shape, read from its config. UserError if the run's config asks for a different one."""
    config = base.loaded.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    heads = config.num_attention_heads
    found = {
        "architecture": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "ffn": config.intermediate_size,
        "positions": config.max_position_embeddings,
        "rotary_pct": rope.get("partial_rotary_factor", 1.0),
        "rope_theta": rope.get("rope_theta", asked.rope_theta),
        "tie_embeddings": bool(base.loaded.model.config.tie_word_embeddings),
    }
    for field in fields(ModelShape):
        value = getattr(asked, field.name)
        if field.name in found and value not in (field.default, found[field.name]):
            raise UserError(
                f"model.{field.name} is {value}, but {base.record.name} has {found[field.name]}; leave out what the "
                "model in model.start_from decides"
            )
    if asked.vocabulary is not None:
        raise UserError("model.vocabulary is decided by the model in model.start_from; leave it out")
    return replace(asked, **found)


def _last_rate(base: OpenBase, parts: str) -> float | None:
    """The learning rate of the base's last step, if it is a run of ours that trained the same `parts`; else, or if 0,
    None. The rate of a sink's row would ruin other weights, and their rate would hardly move the row.
    """
    if base.provenance.get("parts", "all") != parts:
        return None
    try:
        run, step = base.provenance["config"], base.provenance["step"]
        return ScheduleSettings(**run["schedule"]).lr(step - 1, run["optimizer"]["lr"]) or None if step > 0 else None
    except (LookupError, TypeError):
        return None


def _rows_read(config: PretrainConfig, base: OpenBase, train: TokenSplit) -> int:
    """How many rows of this data, in this order, the base has been trained on."""
    try:
        run, data = base.provenance["config"], base.provenance["data"]
        same = data["fingerprint"] == train.fingerprint and run["seed"] == config.seed
        same = same and all(run["data"][key] == getattr(config.data, key) for key in ("sequence", "shuffle"))
        rows = base.provenance["step"] * (run["training"]["batch_tokens"] // run["data"]["sequence"])
        return rows + (run["data"].get("skip") or 0) if same else 0
    except (LookupError, TypeError):
        return 0


def moments_of(
    config: PretrainConfig, base: OpenBase | None, model: torch.nn.Module
) -> dict[int, dict[str, torch.Tensor]] | None:
    """The optimiser's state in `optimizer.start_from`, by parameter number; None if none is to be loaded.

    None is loaded if the run resumes from a checkpoint of its own, which holds its state. If `optimizer.start_from` is
    a run, the state is that of the base's step, even if the base is an export.

    Raises UserError if the state belongs to other parameters than those that are trained here.
    """
    name = config.optimizer.start_from
    if name is None or base is None or checkpoint_steps(Path(config.output)):
        return None
    path, step = Path(name), base.provenance.get("step")
    file = find_checkpoint(path, None if path.is_file() else step)
    states = read_checkpoint(file).get("optimizer_states") or [{}]
    state = states[0].get("state", {})
    trained = [parameter for group in parameter_groups(model, 0.0) for parameter in group["params"]]
    shapes = {number: tuple(parameter.shape) for number, parameter in enumerate(trained)}
    if {number: tuple(one["exp_avg"].shape) for number, one in state.items()} != shapes:
        raise UserError(
            f"optimizer.start_from: {file} has moments of other parameters than this run trains; leave it out, or give "
            "the checkpoint that the model in model.start_from was made from"
        )
    return state


def check_unchanged(base: OpenBase | None, checkpoint: Path) -> None:
    """UserError if the run of `checkpoint` started from a base with other weights."""
    before = Recipe.from_dict(read_checkpoint(checkpoint)["recipe"]).base
    if base is not None and before is not None:
        check_base(before, base.record, str(checkpoint))
