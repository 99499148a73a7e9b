"""What the commands with memories share: the options that select memories, and the memories made from them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from sinkmodel.errors import UserError
from sinkmodel.parser import name_of, positive, whole

PUBLISHED = "snapkv-as-published"
NAMM = "namm"


def add_memory_arguments(parser: argparse.ArgumentParser, sinks_default: str = "the method's own") -> None:
    parser.add_argument(
        "--budgets",
        type=positive,
        nargs="+",
        default=[256],
        metavar="C",
        help="slots of a KV head at the end of the prompt (default: 256)",
    )
    parser.add_argument(
        "--sinks", type=whole, metavar="S", help=f"first tokens that every memory keeps (default: {sinks_default})"
    )
    parser.add_argument(
        "--window", type=positive, metavar="W", help="last tokens that are always kept (default: the method's own)"
    )
    parser.add_argument(
        "--positions",
        choices=("text", "cache"),
        default="text",
        help="positions of kept keys: those in the text, or numbered again from 0 (default: text)",
    )
    parser.add_argument(
        "--layer",
        type=whole,
        metavar="R",
        help="layer in which gemfilter selects tokens (default: 13/32 of all)",
    )
    add_artefact_argument(parser)


def add_artefact_argument(parser: Any) -> None:
    parser.add_argument(
        "--artefact",
        type=name_of,
        metavar="NAME",
        help="the evolved network of namm: a folder that sink-evolve wrote, or a Hub name",
    )


def memory_maker(options: argparse.Namespace, model: Any, name: str, budget: int) -> Callable[[], Any]:
    """A function that makes an empty memory of that name with the options' settings, for a model or its config."""
    from sinkmodel.memories import make_memory

    settings: dict[str, Any] = {"positions": options.positions}
    if name == "gemfilter":
        settings = {} if options.layer is None else {"layer": options.layer}
    if name == PUBLISHED:
        settings["group"] = "as_published"
    settings |= {key: getattr(options, key) for key in ("sinks", "window") if getattr(options, key) is not None}
    return partial(make_memory, "snapkv" if name == PUBLISHED else name, model, budget, **settings)


def namm_rows(options: argparse.Namespace, model: Any, forgotten: Any = None) -> dict[str, Callable[[], Any]]:
    """For each row of `namm` a function that makes its memory, the NAMM first; for a model or its config.

    Args:
        forgotten: a `Forgotten` that counts what the NAMM kept of each prompt; None: it is not counted.
    """
    from eval.measures.memories.controls import namm_makers
    from sinkmodel.memories.namm import read_artefact

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
        raise UserError("namm needs an evolved network; give --artefact, a folder that sink-evolve wrote or a Hub name")
    if getattr(options, "positions", "text") != "text":
        raise UserError(
            f"--positions {options.positions} is not for namm, whose heads keep sets of different sizes; leave it out"
        )
    from sinkmodel.memories.namm import read_artefact

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
    from transformers import LlamaConfig

    of_any_model = argparse.Namespace(**{**vars(options), "layer": None})
    for name in names:
        for budget in options.budgets:
            try:
                memory_maker(of_any_model, LlamaConfig(), name, budget)()
            except UserError as error:
                raise UserError(f"{name} at --budgets {budget}: {error}") from None
