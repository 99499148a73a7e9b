"""`sink-eval ppl`: what each cache policy costs in perplexity on real text.

Scored as the design says ("What is scored"): the first N text tokens of each document are a stream of their own; the
sinks of a sink model stand in front, come on top of N and are never scored; the first text token is not scored either,
so that sink and vanilla models answer for the same targets. The query at place p predicts the token at p + 1; "after
overflow" are the queries p ≥ C, the first that have lost something to eviction (with the paper's count of keys the
one at C has not yet; it stays in, so that all rows are means over the same queries).
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.measures.command import (
    MODEL_HELP,
    add_common_arguments,
    check_output,
    keys_seen,
    load,
    new_table,
    number,
    show,
    write_result,
)
from eval.measures.meters import PeakMemory
from eval.measures.statistics import block_stderr, by_position, mean
from eval.policies.choice import NAMES, check, choose
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.parser import positive, whole
from sinkmodel.progress import CountedProgress

if TYPE_CHECKING:
    from eval.policies.policy import Policy
    from sinkmodel.loading import LoadedModel

DESCRIPTION = "Perplexity of a model on text under streaming caches, exactly as token by token but in chunks."
EXAMPLE = "sink-eval ppl --model runs/sink --text book.txt --budget 256 --sinks 0 1 2 4 --policies dense window sink"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="NAME", help=MODEL_HELP)
    parser.add_argument(
        "--text",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help=".txt is one document; .jsonl and .parquet have one a row (also .gz, .xz, .zst)",
    )
    parser.add_argument(
        "--budget", type=positive, default=256, metavar="C", help="keys a query sees, its own and the sinks counted"
    )
    parser.add_argument(
        "--sinks", type=whole, nargs="+", default=[0, 1, 2, 4], metavar="S", help="first keys that are never evicted"
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=NAMES,
        help="default: window (if --sinks has a 0) and sink; -paper: as in the paper's code, a query sees C + 1 keys",
    )
    parser.add_argument(
        "--stride",
        type=positive,
        default=1,
        metavar="N",
        help="queries that a window of recompute answers for, with C - N + 1 … C keys (default: 1, exact and slow)",
    )
    parser.add_argument("--tokens", type=positive, metavar="N", help="text tokens of each document (default: all)")
    parser.add_argument(
        "--documents",
        type=positive,
        metavar="N",
        help="first documents of each file that fill the budget (default: all)",
    )
    parser.add_argument(
        "--chunk", type=positive, default=256, metavar="N", help="queries computed together; changes the speed alone"
    )
    add_common_arguments(parser)


def run(options: argparse.Namespace) -> None:
    check(options.sinks, options.budget)
    if options.tokens is not None and options.tokens < options.budget:
        raise UserError(
            f"--tokens {options.tokens} does not fill --budget {options.budget}; raise one or lower the other"
        )
    _check_windows(options, sinks=0)
    _check_files(options)
    loaded = load(options)
    sinks = len(loaded.sink_ids)
    _check_windows(options, sinks)
    texts, documents = read_texts(loaded, options.text, options.budget, options.tokens, options.documents)
    policies = choose(options.policies, options.sinks, options.budget, sinks, options.stride)
    _check_positions(loaded, documents, options.budget, policies)
    rows = [
        measure(loaded, documents, policy, options.budget, options.chunk, f"{i}/{len(policies)} {policy.label}")
        for i, policy in enumerate(policies, 1)
    ]
    print_table(loaded, options, rows)
    if options.json is not None:
        write_result(
            options.json,
            {
                "command": "ppl",
                "model": options.model,
                "sink_ids": loaded.sink_ids,
                "budget": options.budget,
                "chunk": options.chunk,
                "dtype": options.dtype,
                "device": str(loaded.model.device),
                "texts": texts,
                "rows": rows,
            },
        )


# ------------------------------------------------------------------------------------------------------- what is read


def read_texts(
    loaded: LoadedModel, files: list[Path], budget: int, tokens: int | None, count: int | None
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """For each file what was taken of it, and the token ids of all documents, with the sinks in front.

    A document that does not fill the budget says nothing about a policy: it is left out, and said; UserError where
    a file has no other. One that is shorter than `tokens` counts with what it has, and that is said too.
    """
    from sinkmodel.files import sha256_of
    from sinkmodel.loading import encode
    from sinkmodel.text import read_documents

    texts: list[dict[str, Any]] = []
    documents: list[list[int]] = []
    for file in files:
        taken = kept = too_short = cut = longest = 0
        for text in read_documents(file):
            ids = encode(loaded, text, tokens)
            longest = max(longest, len(ids))
            if len(ids) < budget:
                too_short += 1
                continue
            cut += tokens is not None and len(ids) < tokens
            documents.append(loaded.sink_ids + ids)
            taken, kept = taken + 1, kept + len(ids)
            if taken == count:
                break
        if not taken and longest == 0:
            raise UserError(f"{file} has no text in it; give a file with at least {budget} tokens in a document")
        if not taken:
            raise UserError(
                f"{file} is shorter than the budget: its longest document has {longest} tokens, --budget is {budget}; "
                "lower the budget or give a longer text"
            )
        if too_short:
            say(f"{file}: left out {too_short} documents with fewer tokens than --budget {budget}")
        if cut:
            say(f"{file}: {cut} of {taken} documents have fewer than --tokens {tokens}; scored with what they have")
        if count is not None and taken < count:
            say(f"{file}: {taken} documents, fewer than --documents {count}")
        texts.append({"file": str(file), "sha256": sha256_of(file), "documents": taken, "tokens": kept})
    return texts, documents


def _check_files(options: argparse.Namespace) -> None:
    """Everything that can be known to fail is said before anything is computed."""
    for file in options.text:
        if not file.is_file():
            what = "is a folder, not a file" if file.is_dir() else "does not exist"
            raise UserError(f"{file} {what}; --text takes .txt, .jsonl or .parquet files")
    check_output("--json", options.json)


def _check_windows(options: argparse.Namespace, sinks: int) -> None:
    """A window that is read again must hold the model's own sinks, and all queries that it answers for."""
    if "recompute" not in (options.policies or ()):
        if options.stride > 1:
            raise UserError("--stride is for recompute alone; add it to --policies or leave --stride out")
        return
    behind = f" behind the model's {sinks} sink tokens" if sinks else ""
    if options.budget <= sinks:
        raise UserError(f"--budget {options.budget} leaves no window{behind}; make it at least {sinks + 1}")
    if options.stride > options.budget - sinks:
        raise UserError(
            f"--stride {options.stride} does not fit into a window of {options.budget - sinks} tokens{behind}; "
            f"use {options.budget - sinks} or less"
        )


def _check_positions(loaded: LoadedModel, documents: list[list[int]], budget: int, policies: list[Policy]) -> None:
    """A cache larger than the model was made for is a mistake; dense beyond it is a result, and said to be one."""
    positions = loaded.positions
    if positions is None:
        return
    longest = max(len(ids) for ids in documents) - 1  # the last token is predicted, never fed
    most = max((policy.keys_seen(longest) for policy in policies if policy.budget is not None), default=0)
    if most > positions:
        raise UserError(
            f"--budget {budget} takes {most} positions and {loaded.name} was made for {positions}; "
            f"use --budget {positions - (most - budget)} or less"
        )
    if longest > positions and any(policy.budget is None for policy in policies):
        say(
            f"dense goes on to place {longest - 1}, and {loaded.name} was made for {positions} positions: "
            f"its row shows what happens beyond them (--tokens {positions - len(loaded.sink_ids) + 1} stays within)"
        )


# --------------------------------------------------------------------------------------------------- what is measured


def measure(
    loaded: LoadedModel, documents: list[list[int]], policy: Policy, budget: int, chunk: int, label: str
) -> dict[str, Any]:
    """One row of the table; its keys are those of the JSON in design.md, "Commands"."""
    sinks = len(loaded.sink_ids)
    longest = max(len(ids) for ids in documents) - 1
    memory = PeakMemory(loaded.model.device)
    started = time.perf_counter()
    with CountedProgress(label, "tokens", sum(len(ids) - 1 for ids in documents)) as progress:
        losses = policy.score(loaded.model, documents, chunk, progress.add)
    seconds = time.perf_counter() - started
    first = sinks  # place of the first query whose target counts: the first text token, which predicts the second
    scored = [nll[first:] for nll in losses]
    after = [nll[max(first, budget) :] for nll in losses]
    nll, nll_after = mean(scored), mean(after)
    assert nll is not None, "a document that fills the budget has something to score"
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


def perplexity(nll: float | None) -> float | None:
    return None if nll is None else math.exp(min(nll, 700.0))  # JSON has no infinity


# ------------------------------------------------------------------------------------------------------ what is shown


def print_table(loaded: LoadedModel, options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    sinks = f"{len(loaded.sink_ids)} sink tokens in front" if loaded.sink_ids else "no sink token"
    table = new_table(
        f"{options.model}, {options.dtype}, {sinks}",
        "≥C: queries that have lost something to eviction; ±: standard error over blocks of C tokens",
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
