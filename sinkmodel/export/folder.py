"""A checkpoint as a model folder that plain transformers loads, 4.57 and 5.x alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from sinkmodel.checkpoint import Recipe, find_checkpoint, read_checkpoint, verify
from sinkmodel.files import atomic_folder, json_bytes, refuse_if_occupied
from sinkmodel.loading import load_model_of
from sinkmodel.sinks import IN_SOFTMAX, SinkConfig
from sinkmodel.tokenizer import TextTokenizer, save_tokenizer

PROVENANCE = "training.json"


def export(checkpoint: Path, output: Path, dtype: str = "float32", step: int | None = None) -> Path:
    """Write the model folder `output` from a checkpoint file or a run folder (its newest, or that of `step`).

    The folder has config, weights (safetensors), tokenizer, generation config and `training.json`. It appears whole or
    not at all. Raises UserError where the checkpoint is none or `output` is occupied.
    """
    refuse_if_occupied(output)
    file = find_checkpoint(checkpoint, step)
    verify(file)
    content = read_checkpoint(file)
    recipe = Recipe.from_dict(content["recipe"])
    model = load_model_of(content, file).to(getattr(torch, dtype))
    with atomic_folder(output) as folder:
        model.generation_config = generation_config(model, recipe.tokenizer, recipe.sink)
        _name_special_ids(model, recipe)
        transformers_logging.disable_progress_bar()
        model.save_pretrained(folder)
        if recipe.sink.kind not in IN_SOFTMAX:
            _write_for_transformers_4(folder / "config.json")
        config = model.config
        save_tokenizer(folder, recipe.tokenizer, recipe.sink, config.max_position_embeddings, config.vocab_size)
        provenance = {"step": recipe.step, "tokens": recipe.tokens, "checkpoint": file.name, **recipe.provenance}
        (folder / PROVENANCE).write_bytes(json_bytes(provenance))
    return output


def generation_config(model: PreTrainedModel, text: TextTokenizer, sink: SinkConfig) -> GenerationConfig:
    """Generation never emits a sink, a padding token, or an id that is no token at all.

    Tokens that are added later have ids beyond these: `save_tokenizer` gives each row a name.
    """
    vocabulary = text.vocabulary
    never = list(range(vocabulary, model.config.vocab_size))  # the sinks are the first of these
    if text.pad_id is not None and text.pad_id != text.eos_id:
        never.insert(0, text.pad_id)
    ids = sink.ids(vocabulary)
    return GenerationConfig(
        bos_token_id=ids[0] if ids else None,
        eos_token_id=text.eos_id,
        pad_token_id=text.eos_id if text.pad_id is None else text.pad_id,
        suppress_tokens=never,
    )


def _name_special_ids(model: PreTrainedModel, recipe: Recipe) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(model.generation_config, name))


def _write_for_transformers_4(path: Path) -> None:
    """transformers 4 ignores `rope_parameters` and would rotate by its defaults: say the same in its words too."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rope = config["rope_parameters"]
    config["rope_theta"] = rope["rope_theta"]
    if config["model_type"] == "gpt_neox":
        config["rotary_pct"] = rope["partial_rotary_factor"]
        config["rotary_emb_base"] = rope["rope_theta"]
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
