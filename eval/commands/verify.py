"""`sink-eval verify`: is one trained sink worth four borrowed ones? (`eval.measures.verdict.verify`)"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from eval.commands import options as shared
from eval.commands.checks import check_files, check_outputs, repeated
from eval.commands.output import give_result
from eval.commands.tables import new_table, number, percent, show
from eval.policies.options import BORROWED, check
from sinkmodel.console import put
from sinkmodel.errors import UserError
from sinkmodel.imports import slow_imports
from sinkmodel.parser import MODEL_HELP, name_of, positive, real
from sinkmodel.results.verdict import Comparison, VerdictResult

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
        help=f"the model with a sink, or several, one per seed: {MODEL_HELP}",
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
    with slow_imports():
        from eval.measures.verdict import verify

    result = verify.run(options)
    give_result(options, result, lambda: print_tables(result))
    return 0 if result.verdict.answer in ("equivalent", "better") else 1


def _check_names(sinks: Sequence[str], vanillas: Sequence[str]) -> None:
    if len(vanillas) not in (1, len(sinks)):
        raise UserError(
            f"--sink has {len(sinks)} models and --vanilla has {len(vanillas)}; give pairs of twins in the same order"
        )
    for option, names in (("--sink", sinks), ("--vanilla", vanillas)):
        if twice := repeated(names):
            raise UserError(f"{option} has {twice} twice, which is not another seed")


# ------------------------------------------------------------------------------------------------------ what is shown


def print_tables(result: VerdictResult) -> None:
    verdict = result.verdict
    table = new_table(
        f"C = {result.budget}, {result.dtype}, after overflow",
        "±: standard error over blocks of C tokens",
        ["model", "run", "policy"],
        ["keys seen", "texts", "tokens", "nll ≥C", "± ≥C", "ppl ≥C"],
    )
    for row in result.rows:
        table.add_row(
            row.model,
            row.run,
            row.label,
            str(row.keys_seen),
            str(row.documents),
            f"{row.tokens_after_overflow:,}",
            *(number(getattr(row, key), "0.4f") for key in ("nll_after_overflow", "stderr_after_overflow")),
            number(row.ppl_after_overflow, ",.2f"),
        )
    show(table)
    table = new_table(
        f"paired differences in nats per token, {100 * result.level:g} % intervals"
        + (f", over {verdict.runs} pairs of runs" if verdict.runs > 1 else ""),
        f"first − second: below zero the first has the lower loss; equivalent: within ±{result.margin:g}; "
        "recompute and dense: at positions spread over the texts",
        ["model", "first", "second"],
        ["tokens", "difference", "interval", "answer"],
    )
    for one in (verdict, *result.each_pair, *result.comparisons):
        table.add_row(
            one.model,
            one.first,
            one.second,
            f"{one.tokens:,}",
            number(one.difference, "+.4f"),
            f"[{one.low:+.4f}, {one.high:+.4f}]" if one.low is not None else "–",
            one.answer_cell,
        )
    show(table)
    put(in_words(verdict, result.margin))


def in_words(verdict: Comparison, margin: float) -> str:
    """The verdict in a few sentences."""
    text = (
        f"{verdict.answer}: {verdict.first} − {verdict.second} = {verdict.difference:+.4f} nats per token, "
        f"{percent(verdict.level, 'g')} % interval [{verdict.low:+.4f}, {verdict.high:+.4f}], margin ±{margin:g}"
    )
    if verdict.why:
        text += f"\n{verdict.why}"
    if verdict.resampled == "blocks":
        text += "\nthe interval holds for these texts, not for others"
    if verdict.more_tokens:
        text += f"\nabout {verdict.more_tokens:,} more tokens would decide, if the difference stayed the same"
    if verdict.runs == 1:
        return f"{text}\nit holds for these two runs; twins of other seeds may differ by more: give several of each"
    runs, texts = verdict.stderr_runs or 0.0, verdict.stderr_texts or 0.0
    text += f"\nof {verdict.runs} pairs of runs; standard error over runs {runs:.4f}, over texts {texts:.4f}: "
    if verdict.more_tokens is None and not verdict.why:
        return f"{text}no amount of text decides this, more pairs of runs would"
    return f"{text}more {'pairs' if runs > texts else 'texts'} would narrow it most"
