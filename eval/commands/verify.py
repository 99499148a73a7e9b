"""`sink-eval verify`: is one trained sink worth four borrowed ones? (`eval.measures.verdict.verify`)"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from eval.commands import options as shared
from eval.commands.checks import check_files, check_outputs, repeated
from eval.commands.output import give_result
from eval.commands.tables import new_table, number, show
from eval.policies.options import BORROWED, check
from eval.wording import answer_cell, each_pair
from sinkmodel.console import put
from sinkmodel.errors import UserError
from sinkmodel.parser import name_of, positive, real

DESCRIPTION = "Is one trained sink worth four borrowed ones? Exit code 0: equivalent or better; 1: worse or undecided."
EXAMPLE = (
    "sink-eval verify --sink runs/token-1 runs/token-2 --vanilla runs/none-1 runs/none-2 --text books-test.jsonl "
    "--budget 256"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sink",
        type=name_of,
        required=True,
        nargs="+",
        metavar="NAME",
        help=f"the model with a sink, or several, one per seed: {shared.MODEL_HELP}",
    )
    parser.add_argument(
        "--vanilla",
        type=name_of,
        required=True,
        nargs="+",
        metavar="NAME",
        help="its twin without a sink, or several, in the same order; or one for all, the model that all started from",
    )
    shared.add_text(parser, "--texts")
    shared.add_budget(parser, "the sinks")
    shared.add_margin(parser, _margin)
    parser.add_argument(
        "--level",
        type=_level,
        default=0.95,
        metavar="P",
        help="level of the two-sided interval (default: 0.95); with 0.9 equivalence is tested at the usual 5 %% on "
        "each side",
    )
    shared.add_tokens(parser)
    parser.add_argument(
        "--these-texts",
        action="store_true",
        help="answer only for these texts, such as one long book; by default the answer is for other texts like them, "
        "and undecided if they weigh less than five documents of one length",
    )
    parser.add_argument(
        "--beside",
        type=positive,
        default=1 << 16,
        metavar="N",
        help="text tokens for each comparison within a model, which the verdict does not use (default: 65536)",
    )
    shared.add_seed(parser, "the resampling")
    shared.add_chunk(parser)
    shared.add_common(parser)


def _margin(text: str) -> float:
    if real(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return float(text)


def _level(text: str) -> float:
    if not 0.5 <= real(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a level; give a number from 0.5 to below 1, such as 0.95")
    return float(text)


def run(options: argparse.Namespace) -> int:
    check([BORROWED], options.budget)
    if options.tokens is not None and options.tokens <= options.budget:
        raise UserError(
            f"--tokens {options.tokens} does not overflow --budget {options.budget}; raise one or lower the other"
        )
    _check_names(options.sink, options.vanilla)
    check_files(options.text)
    check_outputs(options)
    from eval.measures.verdict import verify

    content = verify.run(options)
    give_result(options, content, lambda: print_tables(content))
    return 0 if content["verdict"]["answer"] in ("equivalent", "better") else 1


def _check_names(sinks: Sequence[str], vanillas: Sequence[str]) -> None:
    if len(vanillas) not in (1, len(sinks)):
        raise UserError(
            f"--sink has {len(sinks)} models and --vanilla has {len(vanillas)}; give pairs of twins in the same order"
        )
    for option, names in (("--sink", sinks), ("--vanilla", vanillas)):
        if twice := repeated(names):
            raise UserError(f"{option} has {twice} twice, which is not another seed")


# ------------------------------------------------------------------------------------------------------ what is shown


def print_tables(content: dict[str, Any]) -> None:
    verdict = content["verdict"]
    table = new_table(
        f"C = {content['budget']}, {content['dtype']}, after overflow",
        "±: standard error over blocks of C tokens",
        ["model", "run", "policy"],
        ["keys seen", "texts", "tokens", "nll ≥C", "± ≥C", "ppl ≥C"],
    )
    for row in content["rows"]:
        table.add_row(
            row["model"],
            row["run"],
            row["label"],
            str(row["keys_seen"]),
            str(row["documents"]),
            f"{row['tokens_after_overflow']:,}",
            *(number(row[key], "0.4f") for key in ("nll_after_overflow", "stderr_after_overflow")),
            number(row["ppl_after_overflow"], ",.2f"),
        )
    show(table)
    table = new_table(
        f"paired differences in nats per token, {100 * content['level']:g} % intervals"
        + (f", over {verdict['runs']} pairs of runs" if verdict["runs"] > 1 else ""),
        f"first − second: below zero the first has the lower loss; equivalent: within ±{content['margin']:g}; "
        "recompute and dense: at positions spread over the texts",
        ["model", "first", "second"],
        ["tokens", "difference", "interval", "answer"],
    )
    for row in [verdict, *each_pair(content), *content["comparisons"]]:
        table.add_row(
            row["model"],
            row["first"],
            row["second"],
            f"{row['tokens']:,}",
            number(row["difference"], "+.4f"),
            f"[{row['low']:+.4f}, {row['high']:+.4f}]" if row["low"] is not None else "–",
            answer_cell(row),
        )
    show(table)
    put(in_words(verdict, content["margin"]))


def in_words(verdict: dict[str, Any], margin: float) -> str:
    """The verdict in a few sentences."""
    text = (
        f"{verdict['answer']}: {verdict['first']} − {verdict['second']} = {verdict['difference']:+.4f} nats per token, "
        f"{100 * verdict['level']:g} % interval [{verdict['low']:+.4f}, {verdict['high']:+.4f}], margin ±{margin:g}"
    )
    if verdict.get("why"):
        text += f"\n{verdict['why']}"
    if verdict["resampled"] == "blocks":
        text += "\nthe interval holds for these texts, not for others"
    if verdict["more_tokens"]:
        text += f"\nabout {verdict['more_tokens']:,} more tokens would decide, if the difference stayed the same"
    if verdict["runs"] == 1:
        return f"{text}\nit holds for these two runs; twins of other seeds may differ by more: give several of each"
    runs, texts = verdict["stderr_runs"], verdict["stderr_texts"]
    text += f"\nof {verdict['runs']} pairs of runs; standard error over runs {runs:.4f}, over texts {texts:.4f}: "
    if verdict["more_tokens"] is None and not verdict.get("why"):
        return f"{text}no amount of text decides this, more pairs of runs would"
    return f"{text}more {'pairs' if runs > texts else 'texts'} would narrow it most"
