"""`sink-eval latency`: what a decoding step costs under each cache policy, once the cache is full.

Like StreamingLLM's Figure 10, but the policies take their steps in turns (`eval.measures.timing`). At a budget C

    dense      transformers' growing cache, holding C keys; it is cut back to this size after every step
    recompute  a forward over the last C tokens for each new token, with only the last position's logits
    window     a StreamingCache of C slots, without sinks
    sink       a StreamingCache of C slots, S of them for sinks

so every query sees C keys. There is one stream of random tokens, since the cost does not depend on their content.

With --prefill, it measures reading a prompt with KV memories instead (`eval.measures.prefill.prefill`).
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from eval.measures.command import (
    MODEL_HELP,
    add_common_arguments,
    check_output,
    device_name,
    give_result,
    interval_of,
    keys_seen,
    load,
    new_table,
    show,
)
from eval.measures.prefill import prefill
from eval.measures.shape import load_shape, read_shape
from eval.policies.choice import BORROWED, check, choose
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.parser import name_of, path_of, positive
from sinkmodel.sinks import IN_SOFTMAX, kind_of

if TYPE_CHECKING:
    from sinkmodel.loading import LoadedModel

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
    which.add_argument("--model", type=name_of, metavar="NAME", help=MODEL_HELP)
    which.add_argument(
        "--shape",
        type=path_of,
        metavar="FILE",
        help="random weights with the sizes of a .yaml, such as configs/models/tiny.yaml",
    )
    parser.add_argument(
        "--budgets",
        type=positive,
        nargs="+",
        metavar="C",
        help="keys a query sees, including its own and the sinks (default: 256 512 1024 2048 4096); with --prefill the "
        "slots of a KV head that are kept of the prompt (default: 1024)",
    )
    parser.add_argument(
        "--sinks",
        type=positive,
        metavar="S",
        help="sinks of the policy sink (default: the model's own, or 4; 0 if the model's sink is in its softmax)",
    )
    parser.add_argument("--policies", nargs="+", choices=NAMES, help="default: all of them")
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
    parser.add_argument("--plot", type=path_of, metavar="FILE.png", help="draw the times to this file")
    add_common_arguments(parser)
    parser.add_argument("--prefill", action="store_true", help="measure reading prompts with KV memories instead")
    prefill.add_arguments(parser.add_argument_group("with --prefill"))


def run(options: argparse.Namespace) -> None:
    _settle(options)
    if options.prefill:
        return prefill.run(options)
    _check(options)
    if options.plot is not None:
        import eval.report.plots  # noqa: F401  # fails before the measurement if matplotlib is missing
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loaded = load(options) if options.shape is None else load_shape(options.shape, options.dtype, options.device)
    front = len(loaded.sink_ids)
    # StreamingLLM keeps four tokens for a model without its own sink.
    sinks = options.sinks or front or (0 if kind_of(loaded.model.config) in IN_SOFTMAX else BORROWED)
    check([sinks, front], min(options.budgets), "--budgets")
    configurations = {
        budget: choose(options.policies, [sinks], budget, front) for budget in sorted(set(options.budgets))
    }
    _check_model(loaded, max(configurations))
    from eval.measures.timing import along_stream, measure

    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for index, (budget, policies) in enumerate(configurations.items(), 1):
        label = f"{index}/{len(configurations)} budget {budget}"
        new_rows, new_ratios = measure(loaded, policies, budget, options.tokens, label)
        rows, ratios = rows + new_rows, ratios + new_ratios
    stream: list[dict[str, Any]] = []
    if options.stream_length is not None:
        for budget, policies in configurations.items():
            for policy in policies:
                if policy.name in ("window", "sink"):
                    stream += along_stream(loaded, policy, budget, options.stream_length, POINTS, options.tokens)
    content = {
        "command": "latency",
        "model": loaded.name,
        "dtype": options.dtype,
        "device": device_name(loaded),
        "threads": torch.get_num_threads(),
        "rows": rows,
        "ratios": ratios,
        "stream": stream,
    }
    give_result(options, content, lambda: print_tables(content))
    if options.plot is not None:
        from eval.report.plots import draw_latency
        from sinkmodel.files import atomic_file

        with atomic_file(options.plot) as aside:
            draw_latency(aside, content)
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
    if options.shape is not None:
        read_shape(options.shape)
    check_output("--json", options.json)
    check_output("--plot", options.plot)
    if options.plot is not None and options.plot.suffix.lower() != ".png":
        raise UserError(f"--plot {options.plot} is not a .png; give a name that ends in .png")
    if options.stream_length is not None:
        if not {"window", "sink"} & set(options.policies):
            raise UserError("--stream-length is only for window and sink; add one of them to --policies")
        shortest = max(options.budgets) + POINTS * 2 * (options.tokens + 8)
        if options.stream_length < shortest:
            raise UserError(
                f"--stream-length {options.stream_length} leaves no room for {POINTS} positions of --tokens "
                f"{options.tokens} after a full cache of {max(options.budgets)}; make it at least {shortest}"
            )


def _check_model(loaded: LoadedModel, budget: int) -> None:
    from eval.measures.meters import PeakMemory
    from eval.policies.policy import end_of, refuse_narrower_window

    refuse_narrower_window(loaded.model, budget)
    end = end_of(loaded.model)
    if end is not None and budget > end:
        raise UserError(
            f"--budgets {budget} is too large: {loaded.name} keeps its rotary frequencies only up to {end}; "
            f"use --budgets {end} or less"
        )
    if not PeakMemory(loaded.model.device).forgets:
        say("this system cannot reset a process's peak memory: peaks are those of the whole run so far")
    if loaded.positions is not None and budget > loaded.positions:
        say(
            f"{loaded.name} was made for {loaded.positions} positions: at larger --budgets its times are valid, its "
            "predictions are not"
        )


# ------------------------------------------------------------------------------------------------------ what is shown


def print_tables(content: dict[str, Any]) -> None:
    table = new_table(
        f"{content['model']}, {content['dtype']}, {content['device']}, {content['threads']} threads",
        "dense: a growing cache that holds as many keys, cut back after each step; recompute: reads as many tokens "
        "again for each token; ms: median; p99: of fewer than 100 steps the slowest; peak: of the process, including "
        "the model",
        ["policy"],
        ["keys seen", "tokens", "ms/token", "p99", "peak MiB"],
    )
    for row in content["rows"]:
        table.add_row(
            row["label"],
            keys_seen(row),
            str(row["tokens"]),
            *(f"{row[key]:,.2f}" for key in ("ms_per_token", "ms_per_token_p99")),
            f"{row['peak_bytes'] / 2**20:,.0f}",
        )
    show(table)
    if content["ratios"]:
        caption = "median over rounds in which the two sides took turns; [95 % interval by bootstrap over the rounds]"
        table = new_table("ratios of ms/token", caption, ["ratio"], ["keys seen", "rounds", "×", "interval"])
        for row in content["ratios"]:
            table.add_row(
                row["ratio"],
                str(row["budget"]),
                str(row["rounds"]),
                f"{row['value']:.2f}",
                interval_of(row["low"], row["high"]),
            )
        show(table)
    if content["stream"]:
        table = new_table(
            "along a stream",
            "× new: ms/token relative to a stream of the same policy that has just filled its cache, measured in turns",
            ["policy"],
            ["tokens seen", "ms/token", "p99", "× new", "interval", "process MiB"],
        )
        for row in content["stream"]:
            table.add_row(
                row["label"],
                f"{row['seen']:,}",
                *(f"{row[key]:,.2f}" for key in ("ms_per_token", "ms_per_token_p99")),
                f"{row['value']:.2f}",
                interval_of(row["low"], row["high"]),
                f"{row['resident_bytes'] / 2**20:,.1f}",
            )
        show(table)
