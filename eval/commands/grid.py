"""`sink-eval grid`: models × S+W × budgets, with seeds as an axis (`eval.measures.verdict.grid`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from eval.commands import options as shared
from eval.commands.checks import check_files, check_outputs, repeated
from eval.commands.output import give_result
from eval.commands.tables import new_table, number, show
from eval.policies.options import check
from sinkmodel.errors import UserError
from sinkmodel.imports import slow_imports
from sinkmodel.parser import MODEL_HELP, name_of
from sinkmodel.results.perplexity import GridResult, GridRow

DESCRIPTION = "Perplexity after overflow of models × S+W × budgets, with mean and interval over twin runs."
EXAMPLE = (
    "sink-eval grid --models none=runs/none-1,runs/none-2 token=runs/token-1,runs/token-2 --sinks 0 1 4 "
    "--budgets 64 256 --text books-test.jsonl"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        required=True,
        nargs="+",
        type=_group,
        metavar="NAME=RUN,RUN…",
        help=f"a name and its twin runs, trained with different seeds; or one run without a name: {MODEL_HELP}",
    )
    shared.add_sinks(parser)
    shared.add_budgets(parser, [64, 128, 256], "keys a query sees, including the sinks (default: 64 128 256)")
    shared.add_text(parser, "--texts")
    shared.add_tokens(parser)
    shared.add_chunk(parser)
    shared.add_common(parser)


def _group(text: str) -> tuple[str, list[str]]:
    """Parse a value of --models: `name=run,run`, or one run, which is its own name."""
    name, equals, listed = text.partition("=")
    runs = [name_of(run) for run in (listed.split(",") if equals else [text])]
    if not name or not all(runs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=RUN,RUN…")
    if repeated(runs):
        raise argparse.ArgumentTypeError(f"{text!r} has a run twice, which is not another seed")
    return name, runs


def run(options: argparse.Namespace) -> None:
    sinks, budgets = list(dict.fromkeys(options.sinks)), sorted(set(options.budgets))
    _check(options, sinks, budgets)
    with slow_imports():
        from eval.measures.verdict import grid

    result = grid.run(options, sinks, budgets)
    give_result(options, result, lambda: print_table(result))


def _check(options: argparse.Namespace, sinks: Sequence[int], budgets: Sequence[int]) -> None:
    check(sinks, budgets[0], "--budgets")
    if twice := repeated([name for name, _ in options.models]):
        raise UserError(f"--models has {twice} twice; give all its runs at once, as {twice}=RUN,RUN")
    if options.tokens is not None and options.tokens <= budgets[-1] + 1:
        raise UserError(
            f"--tokens {options.tokens} does not overflow --budgets {budgets[-1]}; raise one or lower the other"
        )
    check_files(options.text)
    check_outputs(options)


# ------------------------------------------------------------------------------------------------------ what is shown


def print_table(result: GridResult) -> None:
    """One line per model and budget, one column per S; below a line the paper's numbers, if it has them."""
    caption = (
        f"S+: the first S keys and the latest C − S; [{100 * result.level:g} % interval for other runs on these texts]"
    )
    if any(row.paper_ppl for row in result.rows):
        caption += (
            "; paper: StreamingLLM, Tables 2, 3 and 6, on another text (PG-19): compare the pattern, not the numbers"
        )
    table = new_table(
        f"perplexity over tokens that have overflowed {result.budgets[-1]}, {result.dtype}",
        caption,
        ["model", "sink"],
        ["runs", "C", *(f"{count}+" for count in result.sinks)],
    )
    for name, runs in result.models.items():
        for budget in result.budgets:
            rows = [row for row in result.rows if (row.model, row.budget) == (name, budget)]
            table.add_row(name, rows[0].sink, str(len(runs)), str(budget), *map(_cell, rows))
            papers = [row.paper_ppl for row in rows]
            if any(papers):
                numbers = [number(ppl, ",.2f") for ppl in papers]
                table.add_row("  paper", rows[0].sink, "1", str(budget), *numbers, style="dim")
    show(table)


def _cell(row: GridRow) -> str:
    cell = f"{row.ppl_after_overflow:,.2f}"
    return cell if row.ppl_low is None else f"{cell} [{row.ppl_low:,.2f}, {row.ppl_high:,.2f}]"
