"""What the commands with memories share: the options that say which ones, and the memories made from them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from sinkmodel.errors import UserError
from sinkmodel.parser import positive, whole

PUBLISHED = "snapkv-as-published"


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
        "--window", type=positive, metavar="W", help="last tokens that stay in any case (default: the method's own)"
    )
    parser.add_argument(
        "--positions",
        choices=("text", "cache"),
        default="text",
        help="of kept keys: those that they have in the text, or numbered again from 0 (default: text)",
    )
    parser.add_argument("--layer", type=whole, metavar="R", help="in which gemfilter chooses (default: 13/32 of all)")


def memory_maker(options: argparse.Namespace, model: Any, name: str, budget: int) -> Callable[[], Any]:
    """Makes the memory of that name as the options have it, for a model or its config."""
    from sinkmodel.memories import make_memory

    settings: dict[str, Any] = {"positions": options.positions}
    if name == "gemfilter":
        settings = {} if options.layer is None else {"layer": options.layer}
    if name == PUBLISHED:
        settings["group"] = "as_published"
    settings |= {key: getattr(options, key) for key in ("sinks", "window") if getattr(options, key) is not None}
    return partial(make_memory, "snapkv" if name == PUBLISHED else name, model, budget, **settings)


def check_memories(options: argparse.Namespace, names: Iterable[str]) -> None:
    """UserError if one of these memories, other than dense, would refuse its settings for every model.

    A model that has no weights shows that, so that nothing is loaded for it. Whether it has --layer shows later.
    """
    from transformers import LlamaConfig

    of_any_model = argparse.Namespace(**{**vars(options), "layer": None})
    for name in names:
        for budget in options.budgets:
            try:
                memory_maker(of_any_model, LlamaConfig(), name, budget)()
            except UserError as error:
                raise UserError(f"{name} at --budgets {budget}: {error}") from None
