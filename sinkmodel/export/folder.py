"""Export a checkpoint as a model folder that plain transformers can load, both 4.57 and 5.x."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from sinkmodel.bases import generation_of
from sinkmodel.checkpoint import Recipe, find_checkpoint, read_checkpoint, verifying
from sinkmodel.choices import Dtype
from sinkmodel.files import atomic_folder, json_bytes, refuse_if_occupied
from sinkmodel.loading import load_model_of
from sinkmodel.provenance import PROVENANCE
from sinkmodel.sinks import IN_SOFTMAX
from sinkmodel.tokenizer import save_tokenizer

# What `build_model` makes, with the weights that transformers names otherwise in a file than in the model.
OWN: dict[str, dict[str, str]] = {
    "gpt_neox": {"lm_head.weight": "embed_out.weight"},
    "llama": {},
    "sink_gpt_neox": {},
    "sink_llama": {},
}
SHARD = "50GB"  # the size from which `save_pretrained` writes several files


def export(checkpoint: Path, output: Path, dtype: Dtype = "float32", step: int | None = None) -> Path:
    """Write the model folder `output` from a checkpoint file or a run folder.

    The folder has config, weights (safetensors), tokenizer, generation config and `training.json`. It is written
    atomically.

    Args:
        dtype: of the weights, the name of a torch dtype.
        step: for a run folder, the checkpoint of this step; None for the newest.

    Raises UserError if the checkpoint is invalid or `output` is occupied.
    """
    refuse_if_occupied(output)
    file = find_checkpoint(checkpoint, step)
    with verifying(file) as wait_for_checksum:
        content = read_checkpoint(file)
        recipe = Recipe.from_dict(content["recipe"])
        model = load_model_of(content, file).to(getattr(torch, dtype))
        rows = model.get_input_embeddings().num_embeddings
        model.generation_config = generation_config(rows, recipe, generation_of(model))
        _name_special_ids(model)
        with atomic_folder(output) as folder:
            _write(folder, model, recipe, file.name)
            wait_for_checksum()
    return output


def _write(folder: Path, model: PreTrainedModel, recipe: Recipe, checkpoint: str) -> None:
    transformers_logging.disable_progress_bar()
    if recipe.base is None and model.config.model_type in OWN:
        save_own(model, folder)
    else:
        model.save_pretrained(folder)  # weights of some families have other names and shapes in their files
    if recipe.sink.kind not in IN_SOFTMAX:
        write_for_transformers_4(folder / "config.json")
    rows = model.get_input_embeddings().num_embeddings
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    save_tokenizer(folder, recipe.tokenizer, recipe.sink, positions, rows)
    stated = {**recipe.stated(), "checkpoint": checkpoint}
    if recipe.base is not None and Path(recipe.base.name).is_absolute():  # the Hub must not get local paths
        stated["base"]["name"] = Path(recipe.base.name).name
    (folder / PROVENANCE).write_bytes(json_bytes(stated))


def save_own(model: PreTrainedModel, folder: Path) -> None:
    """Write what `save_pretrained` writes, for a GPT-NeoX or Llama that we built ourselves.

    `save_pretrained` compiles the patterns by which transformers renames the weights of all families, and imports
    DeepSpeed if that is installed. In an export of 162M parameters that was nearly half of the CPU time.
    """
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    renamed = OWN[model.config.model_type]
    weights: dict[int, tuple[str, Tensor]] = {}
    for name, weight in model.state_dict().items():  # of a tied head only the embedding is written
        weights.setdefault(weight.data_ptr(), (renamed.get(name, name), weight))
    save_torch_state_dict(dict(weights.values()), folder, max_shard_size=SHARD)


def generation_config(rows: int, recipe: Recipe, of_base: dict[str, Any]) -> GenerationConfig:
    """The generation config. Generation then never emits a sink, a padding token, or the id of an unused row.

    Tokens that are added later get ids beyond these, since `save_tokenizer` gives each row a name.

    Args:
        rows: rows of the embedding.
        of_base: the base's `generation_of`, used if the checkpoint does not record it. Its sampling settings are kept.
            So are its end-of-text tokens, if they are special tokens.
    """
    text, front = recipe.tokenizer, [*recipe.sink.ids(recipe.tokenizer.vocabulary), *recipe.tokenizer.front]
    kept = {} if recipe.base is None else dict(of_base if recipe.generation is None else recipe.generation)
    special = [i for i, token in text.backend().get_added_tokens_decoder().items() if token.special]
    ends = [text.eos_id] if text.eos_id is not None else []
    ends += [i for i in kept.pop("eos_token_id", []) if i in special and i not in ends]
    never = list(range(text.vocabulary, rows))  # the sinks are the first of these
    if text.pad_id is not None and text.pad_id not in ends:
        never.insert(0, text.pad_id)
    more = [i for i in kept.pop("suppress_tokens", []) if i < text.vocabulary and i not in (*ends, *never)]
    return GenerationConfig(
        bos_token_id=front[0] if front else None,
        eos_token_id=ends if len(ends) > 1 else next(iter(ends), None),
        pad_token_id=text.eos_id if text.pad_id is None else text.pad_id,
        suppress_tokens=[*more, *never],
        **kept,
    )


def _name_special_ids(model: PreTrainedModel) -> None:
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(model.generation_config, name))


# ------------------------------------------------------------------------------------------------------- transformers 4


def write_for_transformers_4(path: Path) -> None:
    """Repeat the rotary settings in the keys of transformers 4, which ignores `rope_parameters` and uses defaults."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and part.get("rope_parameters"):
            part |= words_of_transformers_4(part)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def words_of_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """The content of `rope_parameters` of transformers 5, as the keys that transformers 4.57 reads.

    If there are parameters for each type of layer (Gemma 3, OLMo 3), 4.57 has one set for layers with full attention,
    and only a base frequency for those with a sliding window.
    """
    rope = config["rope_parameters"]
    full = rope.get("full_attention") or (rope if "rope_theta" in rope else {})
    sliding = rope.get("sliding_attention") or {}
    words: dict[str, Any] = {}
    if "rope_theta" in full:
        words["rope_theta"] = full["rope_theta"]
    if "rope_theta" in sliding:
        words["rope_local_base_freq"] = sliding["rope_theta"]
    if "partial_rotary_factor" in full:
        words["partial_rotary_factor"] = full["partial_rotary_factor"]
    scaling = {name: value for name, value in full.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if scaling.get("rope_type", "default") != "default":
        words["rope_scaling"] = scaling
        if scaling["rope_type"] == "longrope":
            words["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    if config["model_type"] == "gpt_neox":
        words |= {"rotary_pct": full["partial_rotary_factor"], "rotary_emb_base": full["rope_theta"]}
    if config["model_type"] == "modernbert-decoder":
        words |= {"global_rope_theta": full["rope_theta"], "local_rope_theta": sliding["rope_theta"]}
    return words
