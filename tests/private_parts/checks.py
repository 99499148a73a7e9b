"""Checks of private parts that more is needed of than a name: parameters, attributes of objects, layouts."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from tests.private_parts.part import resolve


def takes(name: str, *parameters: str) -> Callable[[], bool]:
    """Check that a function at a dotted path has these parameters."""
    return lambda: set(parameters) <= set(inspect.signature(resolve(name)).parameters)


def sets(class_name: str, *attributes: str) -> Callable[[], bool]:
    """Check that the methods of a class assign these attributes of `self`."""

    def check() -> bool:
        tree = ast.parse(textwrap.dedent(inspect.getsource(resolve(class_name))))
        stored = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        return set(attributes) <= stored

    return check


def operator(name: str, *arguments: str) -> Callable[[], bool]:
    """Check that an operator of torch takes exactly these arguments, in this order: we pass them by place."""
    return lambda: [each.name for each in resolve(f"torch.ops.{name}").default._schema.arguments] == list(arguments)


@functools.cache
def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=16, max_position_embeddings=32)).eval()


@functools.cache
def seen_by_generate() -> dict[str, Any]:
    """The arguments of `_prepare_cache_for_generation` in a real call of `generate`."""
    import torch

    model, seen = tiny_llama(), {}
    original = type(model)._prepare_cache_for_generation

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.update(inspect.signature(original).bind(model, *args, **kwargs).arguments)
        return original(model, *args, **kwargs)

    model._prepare_cache_for_generation = spy
    try:
        ids = torch.tensor([[3, 4, 5]])
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, pad_token_id=0)
    finally:
        del model._prepare_cache_for_generation
    return seen


@functools.cache
def idle_trainer() -> Any:
    from lightning.pytorch import Trainer

    return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)


def cache_arguments() -> bool:
    seen = seen_by_generate()
    return {"generation_config", "model_kwargs", "max_cache_length"} <= set(seen) and bool(
        seen["generation_mode"].value
    )


def mask_length() -> bool:
    return seen_by_generate()["generation_config"]._mask_length == 3


def pad_token() -> bool:
    return seen_by_generate()["generation_config"]._pad_token_tensor.tolist() in (0, [0])


def from_model_config() -> bool:
    from transformers import GenerationConfig

    made = GenerationConfig.from_model_config(tiny_llama().config)
    return made._from_model_config is True and not getattr(GenerationConfig(), "_from_model_config", False)


def batch_progress() -> bool:
    progress = idle_trainer().fit_loop.epoch_loop.batch_progress.state_dict()
    counted = {"ready", "started", "processed", "completed"}
    saved = idle_trainer().fit_loop.state_dict()
    return (
        "epoch_loop.batch_progress" in saved
        and set(progress) == {"total", "current", "is_last_batch"}
        and all(set(progress[name]) == counted for name in ("total", "current"))
    )


def wandb_record() -> bool:
    record = resolve("wandb.proto.wandb_internal_pb2.Record")()
    record.history.step.num = 3
    item = record.history.item.add()
    item.key, item.value_json = "loss", "1"
    item.nested_key.append("loss")
    again = type(record)()
    again.ParseFromString(record.SerializeToString())
    return again.HasField("history") and again.history.step.num == 3 and again.history.item[0].nested_key[0] == "loss"


def sigma() -> bool:
    import cmaes
    import numpy as np

    return all(kind(np.zeros(2), 0.5)._sigma == 0.5 for kind in (cmaes.CMA, cmaes.SepCMA))


def actions() -> bool:
    import argparse

    return {"-h", "--help"} <= {option for each in argparse.ArgumentParser()._actions for option in each.option_strings}
