"""`sink-eval ppl`: what each cache policy costs in perplexity on real text (`eval.measures.perplexity`)."""

from __future__ import annotations

import argparse

from eval.commands import options as shared
from eval.commands.checks import check_files, check_outputs
from eval.commands.output import give_result
from eval.commands.tables import keys_seen, mebibytes, new_table, number, show
from eval.policies.options import check, check_stride
from sinkmodel.errors import UserError
from sinkmodel.imports import slow_imports
from sinkmodel.parser import positive
from sinkmodel.results.perplexity import PerplexityResult

DESCRIPTION = "Perplexity of a model on text under streaming caches, exactly as token by token but in chunks."
EXAMPLE = "sink-eval ppl --model runs/sink --text book.txt --budget 256 --sinks 0 1 2 4 --policies dense window sink"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    shared.add_text(parser)
    shared.add_budget(parser, "its own and the sinks")
    shared.add_sinks(parser)
    shared.add_policies(
        parser, "window (if --sinks has a 0) and sink; -paper: a query sees C + 1 keys, as in the paper's code"
    )
    parser.add_argument(
        "--stride",
        type=positive,
        default=1,
        metavar="N",
        help="for recompute: score N queries per window, with C - N + 1 to C keys (default: 1, exact and slow)",
    )
    shared.add_tokens(parser)
    shared.add_documents(parser, "fill the budget")
    shared.add_chunk(parser)
    shared.add_common(parser)


def run(options: argparse.Namespace) -> None:
    check(options.sinks, options.budget)
    if options.tokens is not None and options.tokens < options.budget:
        raise UserError(
            f"--tokens {options.tokens} does not fill --budget {options.budget}; raise one or lower the other"
        )
    check_stride(options.policies, options.stride, options.budget, sinks=0)
    check_files(options.text)
    check_outputs(options)
    with slow_imports():
        from eval.measures import perplexity

    result, sink = perplexity.run(options)
    give_result(options, result, lambda: print_table(result, sink))


def print_table(result: PerplexityResult, sink: str) -> None:
    table = new_table(
        f"{result.model}, {result.dtype}, {sink}",
        "≥C: queries at positions ≥ C, after the first eviction; ±: standard error over blocks of C tokens",
        ["policy"],
        ["keys seen", "texts", "tokens", "nll", "±", "ppl", "nll ≥C", "± ≥C", "ppl ≥C", "tokens/s", "peak MiB"],
    )
    for row in result.rows:
        table.add_row(
            row.label,
            keys_seen(row),
            str(row.documents),
            f"{row.tokens:,}",
            *(number(getattr(row, key), "0.4f") for key in ("nll", "stderr")),
            number(row.ppl, ",.2f"),
            *(number(getattr(row, key), "0.4f") for key in ("nll_after_overflow", "stderr_after_overflow")),
            number(row.ppl_after_overflow, ",.2f"),
            f"{row.tokens_per_second:,.0f}",
            mebibytes(row.peak_bytes, ",.0f"),
        )
    show(table)
