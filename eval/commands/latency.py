"""`sink-eval latency`: what a decoding step costs under each cache policy, once the cache is full.

`eval.measures.latency` measures it. With --prefill, the command is `eval.commands.prefill`.
"""

from __future__ import annotations

import argparse
from typing import Any

from eval.commands import options as shared
from eval.commands import prefill
from eval.commands.checks import check_outputs, check_plot
from eval.commands.output import give_result
from eval.commands.tables import interval_of, keys_seen, mebibytes, new_table, show
from eval.policies.options import check
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.files import atomic_file
from sinkmodel.imports import slow_imports
from sinkmodel.parser import path_of, positive
from sinkmodel.results.latency import LatencyResult, Ratio, StreamRow

DESCRIPTION = (
    "Milliseconds and memory of a decoding step under each cache policy, once the cache is full.\n"
    "With --prefill: of reading a prompt with each KV memory, and of the answer after it."
)
EXAMPLE = "sink-eval latency --model runs/sink --budgets 256 1024 4096 --plot latency.png --stream-length 100000"
NAMES = ("dense", "recompute", "window", "sink")
POINTS = 5  # positions along --stream-length at which steps are timed
BUDGETS = [256, 512, 1024, 2048, 4096]
DEFAULTS: dict[str, Any] = {
    "policies": list(NAMES),
    "sinks": None,
    "tokens": 128,
    "stream_length": None,
    "plot": None,
}  # defaults of the options that --prefill does not take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    shared.add_model(which, required=False)
    which.add_argument(
        "--shape",
        type=path_of,
        metavar="FILE",
        help="random weights with the sizes of a .yaml, such as configs/models/tiny.yaml",
    )
    shared.add_budgets(
        parser,
        None,
        "keys a query sees, including its own and the sinks (default: 256 512 1024 2048 4096); with --prefill the "
        "slots of a KV head that are kept of the prompt (default: 1024)",
    )
    parser.add_argument(
        "--sinks",
        type=positive,
        metavar="S",
        help="sinks of the policy sink (default: the model's own, or 4; 0 if the model's sink is in its softmax)",
    )
    shared.add_policies(parser, "all of them", NAMES)
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="tokens timed for each policy at each budget, in blocks of 8; for recompute one per block (default: 128)",
    )
    parser.add_argument(
        "--stream-length",
        type=positive,
        metavar="N",
        help="also time window and sink at five positions along a stream of N tokens",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="processor threads (default: PyTorch's choice)")
    shared.add_plot(parser, "draw the times")
    shared.add_common(parser)
    parser.add_argument("--prefill", action="store_true", help="measure reading prompts with KV memories instead")
    prefill.add_arguments(parser.add_argument_group("with --prefill"))


def run(options: argparse.Namespace) -> None:
    _settle(options)
    if options.prefill:
        return prefill.run(options)
    _check(options)
    with slow_imports():
        from eval.measures import latency

    if options.plot is not None:  # before the measurement, since matplotlib may be missing
        from eval.report.plots import draw_latency
    result = latency.run(options, POINTS)
    give_result(options, result, lambda: print_tables(result))
    if options.plot is not None:
        with atomic_file(options.plot) as aside:
            draw_latency(aside, result)
        say(f"wrote {options.plot}")


# ---------------------------------------------------------------------------------------------------- what is checked


def _settle(options: argparse.Namespace) -> None:
    """Fill in the defaults of the chosen measurement. Raises UserError for an option of the other one."""
    ours, others = (prefill.DEFAULTS, DEFAULTS) if options.prefill else (DEFAULTS, prefill.DEFAULTS)
    for name in others:
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option} is not for --prefill; leave it out"
                if options.prefill
                else f"{option} is only for --prefill; add that, or leave {option} out"
            )
    for name, default in ours.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    if options.budgets is None:
        options.budgets = prefill.BUDGETS if options.prefill else BUDGETS


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for options that cannot work, before anything is loaded."""
    check([options.sinks or 1], min(options.budgets), "--budgets")
    check_outputs(options, "plot")
    check_plot(options.plot)
    if options.stream_length is not None:
        if not {"window", "sink"} & set(options.policies):
            raise UserError("--stream-length is only for window and sink; add one of them to --policies")
        shortest = max(options.budgets) + POINTS * 2 * (options.tokens + 8)
        if options.stream_length < shortest:
            raise UserError(
                f"--stream-length {options.stream_length} leaves no room for {POINTS} positions of --tokens "
                f"{options.tokens} after a full cache of {max(options.budgets)}; make it at least {shortest}"
            )


# ------------------------------------------------------------------------------------------------------ what is shown


def print_tables(result: LatencyResult) -> None:
    table = new_table(
        f"{result.model}, {result.dtype}, {result.device}, {result.threads} threads",
        "dense: a growing cache that holds as many keys, cut back after each step; recompute: reads as many tokens "
        "again for each token; ms: median; p99: of fewer than 100 steps the slowest; peak: of the process, including "
        "the model",
        ["policy"],
        ["keys seen", "tokens", "ms/token", "p99", "peak MiB"],
    )
    for row in result.rows:
        table.add_row(
            row.label,
            keys_seen(row),
            str(row.tokens),
            *(f"{getattr(row, key):,.2f}" for key in ("ms_per_token", "ms_per_token_p99")),
            mebibytes(row.peak_bytes, ",.0f"),
        )
    show(table)
    if result.ratios:
        _print_ratios(result.ratios)
    if result.stream:
        _print_stream(result.stream)


def _print_ratios(ratios: list[Ratio]) -> None:
    caption = "median over rounds in which the two sides took turns; [95 % interval by bootstrap over the rounds]"
    table = new_table("ratios of ms/token", caption, ["ratio"], ["keys seen", "rounds", "×", "interval"])
    for one in ratios:
        interval = interval_of(one.low, one.high)
        table.add_row(one.ratio, str(one.budget), str(one.rounds), f"{one.value:.2f}", interval)
    show(table)


def _print_stream(stream: list[StreamRow]) -> None:
    table = new_table(
        "along a stream",
        "× new: ms/token relative to a stream of the same policy that has just filled its cache, measured in turns",
        ["policy"],
        ["tokens seen", "ms/token", "p99", "× new", "interval", "process MiB"],
    )
    for row in stream:
        table.add_row(
            row.label,
            f"{row.seen:,}",
            *(f"{getattr(row, key):,.2f}" for key in ("ms_per_token", "ms_per_token_p99")),
            f"{row.value:.2f}",
            interval_of(row.low, row.high),
            mebibytes(row.resident_bytes, ",.1f"),
        )
    show(table)
