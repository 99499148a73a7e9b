"""`sink-eval ppl`: what each cache policy costs in perplexity on real text.

The first N text tokens of each document are one stream. A sink model's sinks come before them; they are not counted in
N and are never scored. The first text token is not scored either, so that sink models and vanilla models are scored on
the same targets.

The query at position p predicts the token at p + 1. "After overflow" means the queries p ≥ C, which are the first to
have lost keys to eviction. With the paper's count of keys, the query at C has not lost any yet; it is included all the
same, so that all rows are means over the same queries.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eval.measures.command import (
    MODEL_HELP,
    add_common_arguments,
    check_output,
    give_result,
    keys_seen,
    load,
    new_table,
    number,
    show,
)
from eval.measures.meters import PeakMemory
from eval.measures.statistics import block_stderr, by_position, mean
from eval.measures.texts import add_text_argument, check_files, check_positions, fed, read_texts
from eval.policies.choice import NAMES, check, choose
from sinkmodel.errors import UserError
from sinkmodel.parser import name_of, positive, whole
from sinkmodel.perplexity import perplexity
from sinkmodel.progress import CountedProgress
from sinkmodel.sinks import kind_of

if TYPE_CHECKING:
    from eval.policies.policy import Policy
    from sinkmodel.loading import LoadedModel

DESCRIPTION = "Perplexity of a model on text under streaming caches, exactly as token by token but in chunks."
EXAMPLE = "sink-eval ppl --model runs/sink --text book.txt --budget 256 --sinks 0 1 2 4 --policies dense window sink"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=name_of, required=True, metavar="NAME", help=MODEL_HELP)
    add_text_argument(parser)
    parser.add_argument(
        "--budget", type=positive, default=256, metavar="C", help="keys a query sees, including its own and the sinks"
    )
    parser.add_argument(
        "--sinks", type=whole, nargs="+", default=[0, 1, 2, 4], metavar="S", help="first keys that are never evicted"
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=NAMES,
        help="default: window (if --sinks has a 0) and sink; -paper: a query sees C + 1 keys, as in the paper's code",
    )
    parser.add_argument(
        "--stride",
        type=positive,
        default=1,
        metavar="N",
        help="for recompute: score N queries per window, with C - N + 1 to C keys (default: 1, exact and slow)",
    )
    parser.add_argument("--tokens", type=positive, metavar="N", help="text tokens of each document (default: all)")
    parser.add_argument(
        "--documents",
        type=positive,
        metavar="N",
        help="use the first N documents of each file that fill the budget (default: all)",
    )
    parser.add_argument(
        "--chunk", type=positive, default=256, metavar="N", help="queries computed together; changes only the speed"
    )
    add_common_arguments(parser)


def run(options: argparse.Namespace) -> None:
    check(options.sinks, options.budget)
    if options.tokens is not None and options.tokens < options.budget:
        raise UserError(
            f"--tokens {options.tokens} does not fill --budget {options.budget}; raise one or lower the other"
        )
    _check_windows(options, sinks=0)
    check_files(options.text)
    check_output("--json", options.json)
    loaded = load(options)
    sinks = len(loaded.sink_ids)
    _check_windows(options, sinks)
    texts, documents = read_texts(loaded, options.text, options.budget, options.tokens, options.documents)
    policies = choose(options.policies, options.sinks, options.budget, sinks, options.stride)
    within = f"--tokens {(loaded.positions or 0) - sinks + 1} stays within"
    check_positions(loaded, fed(documents), policies, within=within)
    rows = [
        measure(loaded, documents, policy, options.budget, options.chunk, f"{i}/{len(policies)} {policy.label}")
        for i, policy in enumerate(policies, 1)
    ]
    content = {
        "command": "ppl",
        "model": options.model,
        "sink_ids": loaded.sink_ids,
        "budget": options.budget,
        "chunk": options.chunk,
        "dtype": options.dtype,
        "device": str(loaded.model.device),
        "texts": texts,
        "rows": rows,
    }
    give_result(options, content, lambda: print_table(loaded, options, rows))


def _check_windows(options: argparse.Namespace, sinks: int) -> None:
    """Raise UserError unless a recomputed window holds the model's own sinks and all queries that it scores."""
    if "recompute" not in (options.policies or ()):
        if options.stride > 1:
            raise UserError("--stride is only for recompute; add recompute to --policies or leave --stride out")
        return
    after_sinks = f" after the model's {sinks} sink tokens" if sinks else ""
    if options.budget <= sinks:
        raise UserError(f"--budget {options.budget} leaves no window{after_sinks}; make it at least {sinks + 1}")
    if options.stride > options.budget - sinks:
        raise UserError(
            f"--stride {options.stride} does not fit into a window of {options.budget - sinks} tokens{after_sinks}; "
            f"use {options.budget - sinks} or less"
        )


# --------------------------------------------------------------------------------------------------- what is measured


def measure(
    loaded: LoadedModel, documents: Sequence[Sequence[int]], policy: Policy, budget: int, chunk: int, label: str
) -> dict[str, Any]:
    """One row of the table, and of `rows` in the JSON result."""
    sinks = len(loaded.sink_ids)
    longest = max(len(ids) for ids in documents) - 1
    memory = PeakMemory(loaded.model.device)
    started = time.perf_counter()
    with CountedProgress(label, "tokens", sum(len(ids) - 1 for ids in documents)) as progress:
        losses = policy.score(loaded.model, documents, chunk, progress.add)
    seconds = time.perf_counter() - started
    first = sinks  # position of the first scored query: it is the first text token and predicts the second
    scored = [nll[first:] for nll in losses]
    after = [nll[max(first, budget) :] for nll in losses]
    nll, nll_after = mean(scored), mean(after)
    assert nll is not None, "a document that fills the budget has at least one token to score"
    return {
        **policy.row(longest),
        "documents": len(documents),
        "tokens": sum(map(len, scored)),
        "tokens_after_overflow": sum(map(len, after)),
        "nll": nll,
        "nll_after_overflow": nll_after,
        "ppl": perplexity(nll),
        "ppl_after_overflow": perplexity(nll_after),
        "stderr": block_stderr(scored, budget),
        "stderr_after_overflow": block_stderr(after, budget),
        "tokens_per_second": sum(len(nll) for nll in losses) / seconds,
        "peak_bytes": memory.peak(),
        "by_position": by_position([(first, part) for part in scored]),
    }


# ------------------------------------------------------------------------------------------------------ what is shown


def print_table(loaded: LoadedModel, options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    kind = kind_of(loaded.model.config)
    in_front = " ".join(loaded.borrowed) or f"{len(loaded.sink_ids)} sink tokens"
    sinks = f"{in_front} in front" if loaded.sink_ids else f"sink: {kind}"
    table = new_table(
        f"{options.model}, {options.dtype}, {sinks}",
        "≥C: queries at positions ≥ C, after the first eviction; ±: standard error over blocks of C tokens",
        ["policy"],
        ["keys seen", "texts", "tokens", "nll", "±", "ppl", "nll ≥C", "± ≥C", "ppl ≥C", "tokens/s", "peak MiB"],
    )
    for row in rows:
        table.add_row(
            row["label"],
            keys_seen(row),
            str(row["documents"]),
            f"{row['tokens']:,}",
            *(number(row[key], "0.4f") for key in ("nll", "stderr")),
            number(row["ppl"], ",.2f"),
            *(number(row[key], "0.4f") for key in ("nll_after_overflow", "stderr_after_overflow")),
            number(row["ppl_after_overflow"], ",.2f"),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
        )
    show(table)
