"""The memories that the options of a command choose, and the checks that these options need."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from transformers import LlamaConfig

from eval.measures.memories.controls import namm_makers
from eval.measures.memories.names import NAMM, PUBLISHED
from sinkmodel.errors import UserError
from sinkmodel.memories import make_memory
from sinkmodel.memories.namm import read_artefact


def memory_maker(options: argparse.Namespace, model: Any, name: str, budget: int) -> Callable[[], Any]:
    """A function that makes an empty memory of that name with the options' settings, for a model or its config."""
    settings: dict[str, Any] = {"positions": options.positions}
    if name == "gemfilter":
        settings = {} if options.layer is None else {"layer": options.layer}
    if name in PUBLISHED:
        settings["group"] = "as_published"
    settings |= {key: getattr(options, key) for key in ("sinks", "window") if getattr(options, key) is not None}
    return partial(make_memory, PUBLISHED.get(name, name), model, budget, **settings)


def namm_rows(options: argparse.Namespace, model: Any, forgotten: Any = None) -> dict[str, Callable[[], Any]]:
    """For each row of `namm` a function that makes its memory, the NAMM first; for a model or its config.

    Args:
        forgotten: a `Forgotten` that counts what the NAMM kept of each prompt; None: it is not counted.
    """
    given = {name: getattr(options, name, None) for name in ("seed", "sinks", "window")}
    settings = {name: value for name, value in given.items() if value is not None}
    return namm_makers(model, *read_artefact(options.artefact), forgotten=forgotten, **settings)


def check_namm(options: argparse.Namespace, memories: Iterable[str]) -> int:
    """The tokens between two decisions of --artefact, or 0 if namm is not among the memories.

    Raises UserError if only one of namm and --artefact is given, if the artefact cannot be read, or for options that a
    NAMM does not support.
    """
    if NAMM not in memories:
        if options.artefact is not None:
            raise UserError("--artefact is the network of namm; add namm to --memories, or leave --artefact out")
        return 0
    if options.artefact is None:
        raise UserError(
            "namm needs an evolved network; give --artefact: a folder that sink-evolve wrote, a Hub name, or "
            "namm-recall, which comes with this package"
        )
    if getattr(options, "positions", "text") != "text":
        raise UserError(
            f"--positions {options.positions} is not for namm, whose heads keep sets of different sizes; leave it out"
        )

    return read_artefact(options.artefact)[0].interval


def check_decides(options: argparse.Namespace, memories: Iterable[str], option: str, prompt: int) -> None:
    """Like `check_namm`, but also raises UserError if a prompt of `prompt` tokens ends before the first decision."""
    interval = check_namm(options, memories)
    if prompt < interval:
        raise UserError(
            f"{option} {prompt} ends before the first decision of --artefact, after {interval} tokens, so that namm "
            f"forgets nothing; make it at least {interval}"
        )


def check_memories(options: argparse.Namespace, names: Iterable[str]) -> None:
    """Raise UserError if one of these memories (dense not among them) does not accept its settings for any model.

    The check uses a config without weights, so nothing is loaded. Whether the model has --layer is checked later.
    """
    of_any_model = argparse.Namespace(**{**vars(options), "layer": None})
    for name in names:
        for budget in options.budgets:
            try:
                memory_maker(of_any_model, LlamaConfig(), name, budget)()
            except UserError as error:
                raise UserError(f"{name} at --budgets {budget}: {error}") from None
