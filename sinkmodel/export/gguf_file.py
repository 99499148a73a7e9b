"""Export a checkpoint as a GGUF file for llama.cpp: the same token ids, one sink in front, the same weights.

llama.cpp itself prepends the `bos` token (`add_bos_token`), which is the sink. Models that it cannot compute are
refused: a sink in the softmax, several sinks, architectures other than ARCHITECTURES, and tokenizers other than
byte-level BPE with a known pattern (`gguf_tokenizer`). Names and layouts are those of its `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from sinkmodel.checkpoint import Recipe, find_checkpoint, read_checkpoint, verifying
from sinkmodel.choices import Dtype
from sinkmodel.errors import UserError
from sinkmodel.export.gguf_tokenizer import add_tokenizer, check_tokenizer
from sinkmodel.files import atomic_file
from sinkmodel.loading import load_model_of
from sinkmodel.sinks import IN_SOFTMAX, SinkConfig

ARCHITECTURES = {
    "gpt_neox": gguf.MODEL_ARCH.GPTNEOX,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
FILE_TYPES = {
    "float32": (gguf.LlamaFileType.ALL_F32, gguf.GGMLQuantizationType.F32),
    "bfloat16": (gguf.LlamaFileType.MOSTLY_BF16, gguf.GGMLQuantizationType.BF16),
    "float16": (gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16),
}

SCALINGS: dict[str, set[str]] = {  # kinds of rotary scaling, with the parameters of each
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}
ROPE = {"rope_type", "rope_theta", "partial_rotary_factor"}


def export_gguf(checkpoint: Path, output: Path, dtype: Dtype = "float32", step: int | None = None) -> Path:
    """Write the file `output` from a checkpoint file or a run folder, atomically.

    Args:
        dtype: of the matrices. Norms and biases are in fp32, as llama.cpp requires.
        step: for a run folder, the checkpoint of this step; None for the newest.

    Raises UserError if the checkpoint is invalid, if `output` exists, and for models that llama.cpp cannot compute.
    """
    if output.exists():
        raise UserError(f"{output} already exists; choose another file or remove it")
    file = find_checkpoint(checkpoint, step)
    with verifying(file) as wait_for_checksum:
        content = read_checkpoint(file)
        recipe = Recipe.from_dict(content["recipe"])
        check_sink(recipe.sink)
        check_model(recipe.model_config)
        check_tokenizer(recipe.tokenizer, recipe.sink)
        model = load_model_of(content, file)
        architecture = ARCHITECTURES[model.config.model_type]
        file_type, kind = FILE_TYPES[dtype]
        with atomic_file(output) as aside:
            writer = gguf.GGUFWriter(aside, gguf.MODEL_ARCH_NAMES[architecture])
            writer.add_name(output.stem)
            writer.add_file_type(file_type)
            _add_shape(writer, model.config)
            add_tokenizer(writer, recipe.tokenizer, recipe.sink, model.config.vocab_size)
            names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
            for name, weight in laid_out(model):
                here = kind if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
                data = gguf.quants.quantize(np.ascontiguousarray(weight.float().numpy()), here)
                writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")) or name, data, raw_dtype=here)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            wait_for_checksum()
    return output


# ---------------------------------------------------------------------------------------------- what can be exported


def check_sink(sink: SinkConfig) -> None:
    """Raise UserError for a sink that llama.cpp would ignore."""
    if sink.kind in IN_SOFTMAX:
        raise UserError(
            f"llama.cpp has no GPT-NeoX or Llama with a sink in the softmax, and this model has a sink of kind "
            f"{sink.kind!r}; export it with --format transformers"
        )
    if sink.tokens > 1:
        raise UserError(
            f"llama.cpp puts one token in front of a text, and this model has {sink.tokens} sinks; "
            "export it with --format transformers"
        )


def check_model(config: dict[str, Any]) -> None:
    """Raise UserError for a model that llama.cpp does not support, or would compute differently."""
    kind = config["model_type"]
    if kind not in ARCHITECTURES:
        raise UserError(
            f"--format gguf supports {', '.join(ARCHITECTURES)}, and this model is {kind}; "
            "export it with --format transformers, then convert the folder with llama.cpp's convert_hf_to_gguf.py"
        )
    rope = config.get("rope_parameters") or {}
    scaling = rope.get("rope_type", "default")
    activation = config.get("hidden_act", "")
    window, positions = config.get("sliding_window"), config["max_position_embeddings"]
    reason = None
    if activation != ("gelu" if kind == "gpt_neox" else "silu"):
        reason = f"its activation is {activation}"
    elif "sliding_attention" in (config.get("layer_types") or ()) or (
        kind == "mistral" and window and window < positions
    ):
        reason = f"its attention has a sliding window of {window}"
    elif kind != "gpt_neox" and rope.get("partial_rotary_factor", 1.0) != 1.0:
        reason = f"it rotates {rope['partial_rotary_factor']:g} of each head"
    elif scaling not in SCALINGS or rope.keys() - SCALINGS[scaling] - ROPE:
        more = ", ".join(sorted(rope.keys() - SCALINGS.get(scaling, set()) - ROPE))
        reason = f"its rotary positions are scaled by {scaling}" + (f" with {more}" if scaling in SCALINGS else "")
    if reason is not None:
        raise UserError(f"llama.cpp cannot compute this {kind}: {reason}; export it with --format transformers")


# --------------------------------------------------------------------------------------------------- writing the file


def _add_shape(writer: Any, config: Any) -> None:
    rope, heads = config.rope_parameters, config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type == "gpt_neox":
        writer.add_rope_dimension_count(int(head * rope["partial_rotary_factor"]))
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_rope_dimension_count(head)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        if head * heads != config.hidden_size or config.model_type == "qwen3":
            writer.add_key_length(head)
            writer.add_value_length(head)
    scaling = rope["rope_type"]
    if scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(rope["factor"])
    if scaling == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def laid_out(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights by transformers' names, in llama.cpp's layout."""
    config = model.config
    heads, interleaved = config.num_attention_heads, ARCHITECTURES[config.model_type] == gguf.MODEL_ARCH.LLAMA
    if config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", frequency_divisors(model)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings and config.model_type != "gpt_neox":
            continue  # llama.cpp then uses the embedding; only a GPT-NeoX needs its own head
        if ".query_key_value." in name:
            weight = thirds(weight, heads)
        elif interleaved and ".q_proj." in name:
            weight = pairs_together(weight, heads)
        elif interleaved and ".k_proj." in name:
            weight = pairs_together(weight, config.num_key_value_heads)
        yield name, weight


def frequency_divisors(model: Any) -> Tensor:
    """The divisor of each rotary frequency, [D/2], by which llama.cpp represents the scaling of Llama 3."""
    rotary, config = model.model.rotary_emb, model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    return (plain / rotary.original_inv_freq.double()).float()


def thirds(x: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a fused weight or bias from (head, one of q k v, dimension) to (one of q k v, head, …)."""
    return x.unflatten(0, (heads, 3, -1)).transpose(0, 1).reshape(x.shape)


def pairs_together(x: Tensor, heads: int) -> Tensor:
    """Move rotary pairs (i, i + D/2) of each head to (2i, 2i + 1), llama.cpp's interleaved layout for Llama."""
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(x.shape)
