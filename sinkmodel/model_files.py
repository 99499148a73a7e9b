"""Load models and tokenizers that other programs wrote: transformers folders and Hub repositories, and GGUF files.

Untrusted files are only data (DESIGN.md, "Files from strangers are data"): weights are read as safetensors or GGUF,
and code that comes with a model is never run. `loading` uses this module for such models.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sinkmodel.bounds import inside
from sinkmodel.errors import UserError, first_line
from sinkmodel.files import read_json
from sinkmodel.gguf_reading import remembered
from sinkmodel.sinks import SinkConfig, check_record, write_sink


def refuse_names_outside(folder: Path) -> None:
    """Raise UserError if a model folder names weights or a tokenizer outside of it: transformers would open them."""
    for path in (*folder.rglob("*.index.json"), *folder.glob("tokenizer_config.json")):
        content = read_json(path)
        if isinstance(content, dict):
            weights, tokenizers = content.get("weight_map"), content.get("fast_tokenizer_files")
            for name in (
                *(dict.fromkeys(weights.values()) if isinstance(weights, dict) else ()),
                *(tokenizers if isinstance(tokenizers, list) else ()),
            ):
                inside(folder, name, path)


def config_at(name: str, **where: Any) -> Any:
    """The config of a model folder or Hub repository; None if transformers cannot read it, which loading reports."""
    from transformers import AutoConfig

    with _quiet():
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
        except Exception:  # a damaged file raises anything
            return None


def quantisation_of(config: Any) -> str | None:
    """The method by which a model's weights are quantised, according to its config; None if they are whole."""
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            if stated := getattr(part, key, None):
                method = stated.get("quant_method") if isinstance(stated, dict) else stated.quant_method
                return str(getattr(method, "value", method) or "unknown method")
    return None


def check_gguf_packages(path: Path) -> None:
    """Raise UserError if a package is missing that transformers needs to read a GGUF file."""
    for package in ("gguf", "accelerate"):  # transformers reports only one at a time, in a long message
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise UserError(
                f"reading {path.name} needs the package {package}; install it with: pip install 'sinkmodel[gguf]'"
            ) from None


def from_gguf(path: Path) -> tuple[Any, Any]:
    check_gguf_packages(path)
    with remembered():
        _refuse_what_transformers_ignores(path)
        model, tokenizer = from_transformers(str(path.parent), gguf_file=path.name)
    # The weights are in fp32 now, so a checkpoint or folder of this model must not declare them as quantised.
    for place, names in (
        (model.config, ("quantization_config", "_is_quantized")),
        (model, ("is_quantized", "quantization_method", "hf_quantizer")),
    ):
        for attribute in names:
            vars(place).pop(attribute, None)
    sink = SinkConfig("token")
    if tokenizer.bos_token == sink.names[0]:  # a GGUF file has no place for the sink's entry in config.json
        write_sink(model.config, sink, [tokenizer.bos_token_id])
    return model, tokenizer


def _refuse_what_transformers_ignores(path: Path) -> None:
    """Raise UserError for a GGUF file that transformers would load without a warning but compute wrongly."""
    import gguf

    try:
        reader = gguf.GGUFReader(str(path))
        scalings = [field.contents() for name, field in reader.fields.items() if name.endswith(".rope.scaling.type")]
        tensors = {tensor.name for tensor in reader.tensors}
        (kind,) = [field.contents() for name, field in reader.fields.items() if name == "general.architecture"]
    except Exception:  # a damaged file raises anything; transformers reports the problem later
        return
    reason = None
    if "rope_freqs.weight" in tensors or any(scaling != "none" for scaling in scalings):
        reason = "it scales its rotary positions"
    elif kind == "llama" and any(name.endswith(("attn_q.bias", "ffn_up.bias")) for name in tensors):
        reason = "its projections have biases"
    if reason is not None:
        raise UserError(
            f"{path} cannot be read with the right numbers: {reason}, and transformers ignores that in a GGUF file; "
            "give the model folder that the file was made from"
        )


def from_transformers(name: str, **where: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    label = os.path.join(name, where["gguf_file"]) if "gguf_file" in where else name
    if "gguf_file" in where:
        needs = "a whole file of an architecture that it reads from GGUF (of ours llama, not gpt_neox)"
    else:
        needs = "a config.json that it knows and complete .safetensors weights"
    with contextlib.nullcontext() if not where.keys() - {"use_safetensors"} else _quiet():  # the Hub may take long
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **where
            )
        except Exception as error:  # a damaged file raises anything, from OSError to struct.error
            remedy = f"transformers needs {needs}, so copy or export it again"
            config = None if "gguf_file" in where else config_at(name, **_local(where))
            if config is not None and (method := quantisation_of(config)):
                remedy = f"its weights are quantised ({method}), so use the model that was quantised"
            raise UserError(
                f"{label} cannot be loaded as a causal language model: {first_line(error)}; {remedy}"
            ) from None
        missing = sorted(report["missing_keys"]) + [str(key) for key in report.get("mismatched_keys", [])]
        if missing:
            raise UserError(
                f"{label}: the weights lack {len(missing)} tensors of the model in the config, the first is "
                f"{missing[0]}; copy or export it again"
            )
    tokenizer = tokenizer_at(name, **_local(where))
    try:
        check_record(model.config)
    except UserError as error:
        raise UserError(f"{label}: {error}") from None
    return model, tokenizer


def _local(where: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments that find a model, those that find its config and tokenizer too."""
    return {key: where[key] for key in ("gguf_file", "local_files_only") if key in where}


def tokenizer_at(name: str, **where: Any) -> Any:
    """The tokenizer of a model folder, of a GGUF file (`gguf_file` in the folder `name`) or of a Hub repository."""
    from transformers import AutoTokenizer

    label = os.path.join(name, where["gguf_file"]) if "gguf_file" in where else name
    with _quiet() if where else contextlib.nullcontext():  # the Hub may take long
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)
        except Exception as error:
            remedy = "put its tokenizer.json and tokenizer_config.json beside the weights"
            if "gguf_file" in where:
                remedy = "copy or export it again"
            raise UserError(f"{label} has no tokenizer that can be read: {first_line(error)}; {remedy}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress progress bars and warnings of transformers in the block; its settings are restored afterwards."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # reading GGUF draws a bar that no setting disables
            yield
    finally:
        logging.set_verbosity(level)
