"""Check whether the training path supports a model: by its config, then by a trial run of the model itself.

    refuse_by_config("org/name")          # raises UserError, before weights are loaded
    check_trainable(model, "org/name")    # raises UserError; the model is unchanged
    silence_dropout(model)

Training runs the decoder's body on whole rows with an attention without a mask (`sinkmodel.attention.CAUSAL`). It
computes the loss from the last hidden states and the weight and bias of the output projection. The trial compares this
with what the model itself computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

import sinkmodel.architectures  # noqa: F401  transformers' mappings then have our models
from sinkmodel.attention import CAUSAL
from sinkmodel.attention_maps import set_attention, watch
from sinkmodel.errors import UserError, first_line, not_finite
from sinkmodel.model_files import config_at, quantisation_of
from sinkmodel.model_support import check_config, own_window
from sinkmodel.names import find_model
from sinkmodel.probe import rotary_of

TRIAL_TOKENS = 16
TOLERANCE = 1e-4  # relative
COARSE = 0.05  # relative, between two attentions in half precision; a wrong one differs by far more
REMEDY = "start from a dense decoder with RoPE, such as Llama, Mistral, Qwen3 or GPT-NeoX"


def refuse_by_config(name: str) -> None:
    """Raise UserError if the config.json of a model folder or Hub name shows an encoder or quantised weights.

    Nothing else of the model is read. Of other kinds of models, and if the config cannot be read, nothing is known yet.
    """
    kind, _ = find_model(name)
    if kind not in ("folder", "hub"):
        return
    config = config_at(name, local_files_only=True) if kind == "folder" else config_at(name)
    if config is None:
        return
    place = f"training cannot start from {name}: "
    if method := quantisation_of(config):
        raise UserError(f"{place}{_quantised(method)}")
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    problem = None
    if getattr(config, "is_encoder_decoder", False):
        problem = "has an encoder; only decoders can be trained here"
    elif encoder:
        problem = "is an encoder: its tokens see those after them"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        problem = "is not a causal language model"
    if problem is not None:
        raise UserError(f"{place}model type {config.model_type!r} {problem}; {REMEDY}")


def _quantised(method: str) -> str:
    return (
        f"its weights are quantised ({method}) and cannot be trained; "
        "start from the model that was quantised, in float32 or bfloat16"
    )


def check_trainable(model: PreTrainedModel, name: str, sequence: int = TRIAL_TOKENS) -> None:
    """Check that training computes the loss of this model, and that the trained model can be streamed.

    Runs the model a few times on one row of at most 16 tokens, without gradients, and leaves it unchanged.

    Args:
        model: a causal language model of transformers, with its own output projection.
        name: the user's name of the model, for messages.
        sequence: tokens in a row of training data.

    Raises:
        UserError: the model is an encoder, has no RoPE, has layers without keys, experts, quantised weights or a
            window narrower than a row, or it computes its logits in another way.
    """
    try:
        _check_by_config(model, sequence)
        with _as_it_was(model):
            _check_by_trial(model, min(TRIAL_TOKENS, sequence))
    except UserError as error:
        raise UserError(f"training cannot start from {name}: {error}") from None


def silence_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0, in modules and configs, so that training draws no random numbers.

    A resumed run is then exact without a saved random state (DESIGN.md, "Resume is exact"). The config keeps the
    dropout of a classifier, which others may put on top of the model.
    """
    configs = [
        module.config for module in model.modules() if isinstance(getattr(module, "config", None), PretrainedConfig)
    ]
    configs += [part for config in configs for part in vars(config).values() if isinstance(part, PretrainedConfig)]
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    for holder in (*model.modules(), *configs):
        for key, value in list(vars(holder).items()):
            if isinstance(value, float) and "drop" in key and not key.startswith(("classifier", "summary")):
                setattr(holder, key, 0.0)


# ------------------------------------------------------------------------------------------------------- the checks


def _check_by_config(model: PreTrainedModel, sequence: int) -> None:
    config, kind, head = model.config.get_text_config(), model.config.model_type, model.get_output_embeddings()
    with _or_another():
        for part in (model.config, config):
            check_config(part, slots=1, text=False)
        if any(getattr(module, "is_causal", True) is False for module in model.modules()):
            raise UserError(f"model type {kind!r} is an encoder: its tokens see those after them")
        if experts := _experts(config.to_dict()):
            raise UserError(
                f"model type {kind!r} is a mixture of experts ({experts}), and the loss that balances its router is "
                "not part of training here"
            )
        if not isinstance(head, nn.Linear):
            raise UserError(f"model type {kind!r} has no linear output projection")
    window = own_window(config)
    if window is not None and window < sequence:
        raise UserError(
            f"model type {kind!r} has its own window of {window} tokens, narrower than rows of {sequence}; "
            f"train on rows of at most {window}"
        )
    method = quantisation_of(model.config)
    whole = all(p.is_floating_point() and p.element_size() > 1 for p in model.parameters())
    if method not in (None, "gguf") or not whole:  # transformers reads GGUF into whole weights
        raise UserError(_quantised(method or "not floating point"))


def _experts(config: dict[str, Any]) -> str | None:
    """The entry of a config that declares a mixture of experts, as text; None for a dense model."""
    for key, value in config.items():
        if isinstance(value, dict) and (found := _experts(value)):
            return found
        if value and str(key).endswith(("experts", "router_aux_loss_coef")):
            return f"{key} {value}"
    return None


@torch.no_grad()
def _check_by_trial(model: PreTrainedModel, tokens: int) -> None:
    kind, head = model.config.model_type, model.get_output_embeddings()
    rows = model.get_input_embeddings().num_embeddings
    ids_1T = (torch.arange(1, tokens + 1, device=model.device) * 7 % rows).unsqueeze(0)
    try:
        set_attention(model, "eager")
        logits_1TV = model(input_ids=ids_1T, use_cache=False).logits
        body_1TD = model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state
        set_attention(model, CAUSAL)
        hidden_1TD = model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state
        ours_1TV = F.linear(body_1TD, head.weight, head.bias)  # the same numbers, in half precision too
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise UserError(
            f"model type {kind!r} does not run as training runs it ({first_line(error)}); {REMEDY}"
        ) from None
    if not logits_1TV.isfinite().all():
        raise not_finite(model)
    with _or_another():
        watch(model, ids_1T, lambda seen: None)  # checks that every layer calls its attention function once
        rotary_of(model)
        if not _difference(hidden_1TD, body_1TD) < (TOLERANCE if model.dtype == torch.float32 else COARSE):
            raise UserError(f"model type {kind!r} has an attention that training does not have")
        if not _difference(ours_1TV, logits_1TV) < TOLERANCE:
            raise UserError(
                f"model type {kind!r} computes its logits in a way that training does not have "
                "(soft-capping or scaling)"
            )


def _difference(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x.float() - y.float()).norm() / y.float().norm()).item() if x.shape == y.shape else float("inf")


@contextlib.contextmanager
def _or_another() -> Iterator[None]:
    """Append the remedy to UserErrors that are raised in the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; {REMEDY}") from None


@contextlib.contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into eval mode in the block; afterwards restore its modes and its attention."""
    attention, modes = model.config._attn_implementation, [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        set_attention(model, attention)
        for module, training in modes:
            module.training = training
