"""A checkpoint as one GGUF file, for llama.cpp: the same token ids, the sink in front once, the same weights.

llama.cpp has the two plain architectures, `llama` and `gptneox`, and byte-level BPE with GPT-2's pattern. Its tokenizer
puts the `bos` token in front by itself (`add_bos_token`), which is the sink. What it cannot say is refused: a sink in
the softmax, several sinks, another kind of tokenizer. Names and layouts are those of its `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor

from sinkmodel.checkpoint import Recipe, find_checkpoint, read_checkpoint, verify
from sinkmodel.errors import UserError
from sinkmodel.files import atomic_file
from sinkmodel.loading import load_model_of
from sinkmodel.sinks import IN_SOFTMAX, SinkConfig
from sinkmodel.tokenizer import TextTokenizer, chat_template, sink_tokenizer
from sinkmodel.unused_rows import unused_name

ARCHITECTURES = {"gpt_neox": gguf.MODEL_ARCH.GPTNEOX, "llama": gguf.MODEL_ARCH.LLAMA}
FILE_TYPES = {
    "float32": (gguf.LlamaFileType.ALL_F32, gguf.GGMLQuantizationType.F32),
    "bfloat16": (gguf.LlamaFileType.MOSTLY_BF16, gguf.GGMLQuantizationType.BF16),
    "float16": (gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16),
}
UNKNOWN_TO_IT = (
    *("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"),
)  # of a BPE
PATTERN = "gpt-2"  # llama.cpp's name for the pattern of ByteLevel(use_regex=True)


def export_gguf(checkpoint: Path, output: Path, dtype: str = "float32", step: int | None = None) -> Path:
    """Write the file `output` from a checkpoint file or a run folder (its newest, or that of `step`).

    Matrices are in `dtype`, norms and biases in fp32, as llama.cpp wants them. The file appears whole or not at all.
    Raises UserError where the checkpoint is none, where `output` exists, and for what llama.cpp cannot compute.
    """
    if output.exists():
        raise UserError(f"{output} exists already; choose another file or remove it")
    file = find_checkpoint(checkpoint, step)
    verify(file)
    content = read_checkpoint(file)
    recipe = Recipe.from_dict(content["recipe"])
    check_sink(recipe.sink)
    check_tokenizer(recipe.tokenizer)
    model = load_model_of(content, file)
    architecture = ARCHITECTURES[model.config.model_type]
    file_type, kind = FILE_TYPES[dtype]
    with atomic_file(output) as aside:
        writer = gguf.GGUFWriter(aside, gguf.MODEL_ARCH_NAMES[architecture])
        writer.add_name(output.stem)
        writer.add_file_type(file_type)
        _add_shape(writer, model.config)
        _add_tokenizer(writer, recipe.tokenizer, recipe.sink, model.config.vocab_size)
        names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
        for name, weight in laid_out(model):
            here = kind if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
            data = gguf.quants.quantize(np.ascontiguousarray(weight.float().numpy()), here)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=here)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return output


# ---------------------------------------------------------------------------------------------- what can be said at all


def check_sink(sink: SinkConfig) -> None:
    """UserError for a sink that llama.cpp would drop."""
    if sink.kind in IN_SOFTMAX:
        raise UserError(
            f"llama.cpp has no GPT-NeoX or Llama with a sink in the softmax, and this model has one of kind "
            f"{sink.kind!r}; export it with --format transformers"
        )
    if sink.tokens > 1:
        raise UserError(
            f"llama.cpp puts one token in front of a text, and this model has {sink.tokens} sinks; "
            "export it with --format transformers"
        )


def check_tokenizer(text: TextTokenizer) -> None:
    """UserError for a tokenizer that llama.cpp would run with other ids.

    It knows patterns by name only. Ours is that of GPT-2, with which the tokenizers of Pythia and those that
    sink-prepare trains cut a text. NFC, which Pythia has, is passed over: llama.cpp does not normalise, so a text that
    is not in NFC has other ids there.
    """
    definition = json.loads(text.definition)
    model, cut, normalizer = (definition.get(name) or {} for name in ("model", "pre_tokenizer", "normalizer"))
    added = definition.get("added_tokens") or []
    odd = [name for name in UNKNOWN_TO_IT if model.get(name)]
    reason = None
    if model.get("type") != "BPE":
        reason = f"its model is {model.get('type')!r}, not BPE"
    elif odd:
        reason = f"its BPE has {odd[0]}"
    elif cut.get("type") != "ByteLevel" or not cut.get("use_regex", True) or cut.get("add_prefix_space", True):
        reason = "it does not cut a text as GPT-2 does (ByteLevel, add_prefix_space false)"
    elif normalizer.get("type", "NFC") != "NFC":
        reason = f"it has the normalizer {normalizer['type']!r}"
    elif any(token[side] for token in added for side in ("lstrip", "rstrip", "single_word")):
        reason = "it has tokens that take in the blanks around them, or stand as words only"
    elif text.backend().encode("").ids:
        reason = "it puts tokens of its own in front of a text"
    elif text.eos_id is None:
        reason = "it has no token for the end of a text"
    if reason is not None:
        raise UserError(f"llama.cpp cannot run this tokenizer: {reason}; export it with --format transformers")


# ------------------------------------------------------------------------------------------------------ what is written


def _add_shape(writer: Any, config: Any) -> None:
    rope, heads = config.rope_parameters, config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type == "gpt_neox":
        writer.add_rope_dimension_count(int(config.hidden_size // heads * rope["partial_rotary_factor"]))
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: Any, text: TextTokenizer, sink: SinkConfig, rows: int) -> None:
    backend = sink_tokenizer(text, sink)
    definition = json.loads(backend.to_str())
    names, kinds = zip(*token_list(definition, rows))
    merges = definition["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PATTERN)
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    ids = sink.ids(text.vocabulary)
    assert text.eos_id is not None
    writer.add_bos_token_id(ids[0] if ids else text.eos_id)  # without one, llama.cpp takes the token of GPT-2's id
    writer.add_eos_token_id(text.eos_id)
    writer.add_pad_token_id(text.eos_id if text.pad_id is None else text.pad_id)
    writer.add_add_bos_token(bool(ids))
    writer.add_add_eos_token(False)
    writer.add_chat_template(chat_template(sink))


def token_list(definition: dict[str, Any], rows: int) -> Iterator[tuple[str, int]]:
    """Name and llama.cpp's kind of each of the `rows` ids; those of no token are marked as unused."""
    added = {token["id"]: token for token in definition["added_tokens"]}
    plain = {number: name for name, number in definition["model"]["vocab"].items()}
    for number in range(rows):
        if number in added:
            kind = gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED
            yield added[number]["content"], kind
        elif number in plain:
            yield plain[number], gguf.TokenType.NORMAL
        else:
            yield unused_name(number), gguf.TokenType.UNUSED


def laid_out(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights under transformers' names, as llama.cpp lays them out."""
    config = model.config
    heads = config.num_attention_heads
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings and config.model_type == "llama":
            continue  # llama.cpp takes the embedding where a Llama has none; a GPT-NeoX must have one
        if ".query_key_value." in name:
            weight = thirds(weight, heads)
        elif name.endswith("q_proj.weight"):
            weight = pairs_together(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = pairs_together(weight, config.num_key_value_heads)
        yield name, weight


def thirds(x: Tensor, heads: int) -> Tensor:
    """Rows (head, of q k v, dimension) of a fused projection to (of q k v, head, dimension); a weight or a bias."""
    return x.unflatten(0, (heads, 3, -1)).transpose(0, 1).reshape(x.shape)


def pairs_together(x: Tensor, heads: int) -> Tensor:
    """Rotary pairs (i, i + D/2) of each head to (2i, 2i + 1): llama.cpp turns the heads of a Llama interleaved."""
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(x.shape)
