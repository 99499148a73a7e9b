"""Options that several commands share; each is declared once. The order of the calls is the order in --help."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from eval.policies.options import NAMES
from sinkmodel.checks import choices_of
from sinkmodel.choices import Dtype, Positions
from sinkmodel.parser import MODEL_HELP, name_of, path_of, positive, real, whole


def add_model(parser: Any, required: bool = True) -> None:
    """--model; `parser` may be a group of arguments, as for all functions here."""
    more = {"required": True} if required else {}  # a group of alternatives takes no `required`
    parser.add_argument("--model", type=name_of, metavar="NAME", help=MODEL_HELP, **more)


def add_text(parser: Any, *aliases: str, required: bool = True) -> None:
    parser.add_argument(
        "--text",
        *aliases,
        required=required,
        nargs="+",
        type=path_of,
        metavar="FILE",
        help=".txt is one document; .jsonl, .ndjson, .json lines and .parquet have one per row (also .gz, .xz, .zst)",
    )


def add_documents(parser: Any, which: str) -> None:
    parser.add_argument(
        "--documents",
        type=positive,
        metavar="N",
        help=f"use the first N documents of each file that {which} (default: all)",
    )


def add_tokens(parser: Any) -> None:
    parser.add_argument("--tokens", type=positive, metavar="N", help="text tokens of each document (default: all)")


def add_budget(parser: Any, including: str) -> None:
    parser.add_argument(
        "--budget", type=positive, default=256, metavar="C", help=f"keys a query sees, including {including}"
    )


def add_budgets(parser: Any, default: list[int] | None, text: str) -> None:
    parser.add_argument("--budgets", type=positive, nargs="+", default=default, metavar="C", help=text)


def add_sinks(parser: Any) -> None:
    parser.add_argument(
        "--sinks", type=whole, nargs="+", default=[0, 1, 2, 4], metavar="S", help="first keys that are never evicted"
    )


def add_policies(parser: Any, default: str, names: Sequence[str] = NAMES) -> None:
    parser.add_argument("--policies", nargs="+", choices=names, help=f"default: {default}")


def add_chunk(parser: Any) -> None:
    parser.add_argument(
        "--chunk", type=positive, default=256, metavar="N", help="queries computed together; changes only the speed"
    )


def add_seed(parser: Any, of: str) -> None:
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help=f"random seed of {of} (default: 0)")


def add_margin(parser: Any, kind: Any = real) -> None:
    parser.add_argument(
        "--margin",
        type=kind,
        default=0.01,
        metavar="NATS",
        help="differences in nats per token that do not matter (default: 0.01)",
    )


def add_csv(parser: Any) -> None:
    parser.add_argument("--csv", type=path_of, metavar="FILE", help="also write the rows to this file, as a table")


def add_plot(parser: Any, text: str) -> None:
    parser.add_argument("--plot", type=path_of, metavar="FILE.png", help=f"{text} to this file")


def add_common(parser: argparse.ArgumentParser) -> None:
    """The last options of every measuring command."""
    parser.add_argument("--dtype", choices=choices_of(Dtype), default="float32")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--json", type=path_of, metavar="FILE", help="also write the rows to this file")


# ----------------------------------------------------------------------------------------------------------- memories


def add_memory_options(parser: Any, sinks_default: str = "the method's own") -> None:
    """The settings of the memories that `memories` and `longcontext` measure."""
    add_budgets(parser, [256], "slots of a KV head at the end of the prompt (default: 256)")
    parser.add_argument(
        "--sinks", type=whole, metavar="S", help=f"first tokens that every memory keeps (default: {sinks_default})"
    )
    parser.add_argument(
        "--window", type=positive, metavar="W", help="last tokens that are always kept (default: the method's own)"
    )
    parser.add_argument(
        "--positions",
        choices=choices_of(Positions),
        default="text",
        help="positions of kept keys: those in the text, or numbered again from 0 (default: text)",
    )
    add_layer(parser, "13/32 of all")
    add_artefact(parser)


def add_layer(parser: Any, default: str) -> None:
    parser.add_argument(
        "--layer",
        type=whole,
        metavar="R",
        help=f"layer in which gemfilter selects tokens (default: {default})",
    )


def add_artefact(parser: Any) -> None:
    parser.add_argument(
        "--artefact",
        type=name_of,
        metavar="NAME",
        help="the evolved network of namm: a folder that sink-evolve wrote, a Hub name, or namm-recall (shipped)",
    )
