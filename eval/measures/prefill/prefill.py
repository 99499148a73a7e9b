"""`sink-eval latency --prefill`: the cost of reading a prompt with each KV memory, and of the answer's steps after it.

    dense                transformers' own cache, which keeps everything
    snapkv … gemfilter   C slots of the prompt in each KV head (`sinkmodel.memories`)
    snapkv-as-published  a separate set of slots for each query head, as in the paper's code

GemFilter saves time on the prompt, the others on the steps after it. So for each pair the answer length is reported at
which the side with the earlier first token falls behind. `measure` takes the times, `crossover` does the arithmetic.
The prompt has random tokens, since the cost does not depend on their content.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from eval.measures.command import (
    check_output,
    device_name,
    give_result,
    interval_of,
    load,
    new_table,
    number,
    show,
    write_csv,
)
from eval.measures.memories.memories import ALONE
from eval.measures.memories.options import NAMM, PUBLISHED, add_artefact_argument, check_decides, namm_rows
from eval.measures.shape import config_of, load_shape, read_shape
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.parser import path_of, positive, whole

if TYPE_CHECKING:
    from eval.measures.prefill.measure import Side
    from sinkmodel.loading import LoadedModel

COMMAND = "latency --prefill"
NAMES = ("dense", *ALONE, PUBLISHED, NAMM)
BUDGETS = [1024]
DEFAULTS: dict[str, Any] = {
    "length": [2048],
    "memories": ["dense", *ALONE],
    "layer": None,
    "artefact": None,
    "answers": [1, 128, 1024],
    "rounds": 5,
    "csv": None,
}
SLACK = 16 * 2**20  # bytes by which a process may grow before it is reported


def add_arguments(group: Any) -> None:
    group.add_argument(
        "--length",
        type=positive,
        nargs="+",
        metavar="N",
        help="tokens of the prompt, without the model's sinks (default: 2048)",
    )
    group.add_argument(
        "--memories",
        nargs="+",
        choices=NAMES,
        metavar="MEMORY",
        help=f"one or more of {', '.join(NAMES)} (default: all but the last two; dense is always measured)",
    )
    group.add_argument(
        "--layer",
        type=whole,
        metavar="R",
        help="layer in which gemfilter selects tokens (default: 13/32 of all layers)",
    )
    add_artefact_argument(group)
    group.add_argument(
        "--answers",
        type=positive,
        nargs="+",
        metavar="N",
        help="answer lengths in tokens: steps are timed there, and total times reported (default: 1 128 1024)",
    )
    group.add_argument(
        "--rounds",
        type=positive,
        metavar="N",
        help="times that every side reads the prompt (default: 5, the fewest for an interval)",
    )
    group.add_argument("--csv", type=path_of, metavar="FILE", help="also write the rows to this file, as a table")


def run(options: argparse.Namespace) -> None:
    _check(options)
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.shape is not None:  # check before making the weights, which may take long
        shape = read_shape(options.shape)
        _check_length(options, f"{options.shape}", shape.positions, 0)
        sides_of(options, config_of(shape))
    loaded = load(options) if options.shape is None else load_shape(options.shape, options.dtype, options.device)
    _check_model(options, loaded)
    from eval.measures.prefill.measure import measure

    rows: list[dict[str, Any]] = []
    crossovers: list[dict[str, Any]] = []
    lengths = sorted(set(options.length))
    for place, length in enumerate(lengths, 1):
        sides = sides_of(options, loaded.model)
        label = f"{place}/{len(lengths)} prompt {length}"
        new_rows, pairs = measure(loaded, sides, length, sorted(set(options.answers)), options.rounds, label)
        rows, crossovers = rows + new_rows, crossovers + pairs
    content = {
        "command": COMMAND,
        "model": loaded.name,
        "dtype": options.dtype,
        "device": device_name(loaded),
        "threads": torch.get_num_threads(),
        "weights_bytes": sum(p.nbytes for p in loaded.model.parameters()),
        "rounds": options.rounds,
        "rows": rows,
        "crossovers": crossovers,
    }
    if options.csv is not None:
        flat = list(map(flat_row, rows))
        write_csv(options.csv, list(flat[0]), [list(row.values()) for row in flat])
        say(f"wrote {options.csv}")
    give_result(options, content, lambda: print_tables(content))


def flat_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row without lists, for CSV: the values of an answer have the answer's length at the end of their names."""
    alone = {key: value for key, value in row.items() if key != "answers"}
    of_answers = {
        f"{key}_{part['answer']}": value for part in row["answers"] for key, value in part.items() if key != "answer"
    }
    return {**alone, **of_answers}


# ---------------------------------------------------------------------------------------------------- what is checked


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for options that cannot work, before a model is loaded."""
    check_output("--json", options.json)
    check_output("--csv", options.csv)
    if options.csv is not None and options.csv == options.json:
        raise UserError(f"--csv and --json are both {options.csv}; give two names")
    if set(options.memories) == {"dense"}:
        raise UserError("--memories has only dense, so there is nothing to compare; add a memory, such as snapkv")
    if options.layer is not None and "gemfilter" not in options.memories:
        raise UserError("--layer is only for gemfilter; add gemfilter to --memories, or leave --layer out")
    check_decides(options, options.memories, "--length", min(options.length))
    budgeted = set(options.memories) - {"dense", NAMM}
    for budget in options.budgets if budgeted else ():
        if budget >= min(options.length):
            raise UserError(
                f"--budgets {budget} keeps every token of --length {min(options.length)}; lower it, or raise --length"
            )
    if options.rounds < DEFAULTS["rounds"]:
        say(f"--rounds {options.rounds}: fewer than {DEFAULTS['rounds']} rounds give no interval")


def _check_length(options: argparse.Namespace, name: str, end: int, front: int) -> None:
    from eval.measures.timing import BLOCK

    fed = front + max(options.length) + max(options.answers) + BLOCK
    if fed > end:
        raise UserError(
            f"--length {max(options.length)} and --answers {max(options.answers)} take {fed} positions with the timed "
            f"steps, and {name} has {end}; use {fed - end} fewer"
        )


def _check_model(options: argparse.Namespace, loaded: LoadedModel) -> None:
    from eval.measures.meters import PeakMemory
    from eval.policies.policy import end_of
    from sinkmodel.model_support import own_window
    from sinkmodel.scoring import check_decoder

    check_decoder(loaded.model, cached=True)
    sides_of(options, loaded.model)
    ends = (loaded.positions, end_of(loaded.model), own_window(loaded.model.config.get_text_config()))
    if known := [end for end in ends if end is not None]:
        _check_length(options, loaded.name, min(known), len(loaded.sink_ids))
    if not PeakMemory(loaded.model.device).forgets:
        say("this system cannot reset a process's peak memory: peaks are those of the whole run so far")


def sides_of(options: argparse.Namespace, model_or_config: Any) -> list[Side]:
    """Dense first, then each memory at each budget. Raises UserError if one of them cannot be created."""
    from eval.measures.prefill.measure import Side, dense_side
    from sinkmodel.memories import make_memory

    sides = [dense_side()]
    for name in dict.fromkeys(options.memories):
        settings: dict[str, Any] = {"group": "as_published"} if name == PUBLISHED else {}
        if name == "gemfilter" and options.layer is not None:
            settings["layer"] = options.layer
        if name == NAMM:
            sides += [Side(row, None, make) for row, make in namm_rows(options, model_or_config).items()]
        for budget in sorted(set(options.budgets)) if name not in ("dense", NAMM) else ():
            make = partial(make_memory, "snapkv" if name == PUBLISHED else name, model_or_config, budget, **settings)
            try:
                make()
            except UserError as error:
                raise UserError(f"{name} at --budgets {budget}: {error}") from None
            sides.append(Side(name, budget, make))
    return sides


# ------------------------------------------------------------------------------------------------------ what is shown


def print_tables(content: dict[str, Any]) -> None:
    head = f"{content['model']}, {content['dtype']}, {content['device']}, {content['threads']} threads"
    for length in dict.fromkeys(row["length"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["length"] == length]
        _print_prompt(f"{head}: a prompt of {length:,} tokens", rows, content["weights_bytes"])
        _print_answers(rows)
        _print_crossovers([pair for pair in content["crossovers"] if pair["length"] == length])
    report_growth(content["rows"])


def report_growth(rows: list[dict[str, Any]]) -> None:
    """Report each memory after which the process has kept clearly more bytes than the memory holds."""
    for row in rows:
        if row["bytes_grown"] > 1.01 * row["bytes_held"] + SLACK:
            more = (row["bytes_grown"] - row["bytes_held"]) / 2**20
            prompt = f"the prompt of {row['length']:,} tokens"
            say(f"{row['label']}: after {prompt} the process has kept {more:,.0f} MiB more than the memory holds")


def _print_prompt(title: str, rows: list[dict[str, Any]], weights: int) -> None:
    table = new_table(
        title,
        "ms to the first token: median; × dense: ratio to dense, median over rounds in which all took turns [95 % "
        f"interval by bootstrap over them]; peak: of the process, including {weights / 2**20:,.0f} MiB of weights; "
        "reading: the part of the peak that reading the prompt added; held: by the memory afterwards; kept: share of "
        "dense's keys and values; grown: by how much the process is larger than before",
        ["memory"],
        ["ms to first token", "× dense", "interval", "peak MiB", "reading", "held", "kept %", "grown"],
    )
    for row in rows:
        table.add_row(
            row["label"],
            f"{row['ttft_ms']:,.1f}",
            number(row["ttft_ratio"], ".2f"),
            interval_of(row["ttft_low"], row["ttft_high"]),
            f"{row['peak_bytes'] / 2**20:,.0f}",
            *(f"{row[key] / 2**20:,.1f}" for key in ("reading_bytes", "bytes_held")),
            f"{100 * row['kept_share']:.0f}",
            f"{row['bytes_grown'] / 2**20:,.1f}",
        )
    show(table)


def _print_answers(rows: list[dict[str, Any]]) -> None:
    table = new_table(
        "answers",
        "ms/step: of a step at the end of such an answer; total: to its last token, with step costs interpolated "
        "linearly between the measured places",
        ["memory"],
        ["answer", "ms/step", "× dense", "interval", "total s", "× dense", "interval"],
    )
    for row in rows:
        for part in row["answers"]:
            table.add_row(
                row["label"],
                f"{part['answer']:,}",
                f"{part['step_ms']:,.2f}",
                number(part["step_ratio"], ".2f"),
                interval_of(part["step_low"], part["step_high"]),
                f"{part['total_ms'] / 1000:,.2f}",
                number(part["total_ratio"], ".2f"),
                interval_of(part["total_low"], part["total_high"]),
            )
    show(table)


def _print_crossovers(pairs: list[dict[str, Any]]) -> None:
    table = new_table(
        "who is ahead",
        "falls behind at: the shortest answer, in tokens, that takes the first one longer than the other; never: its "
        "steps cost no more; an interval from 0 means that the order of the first tokens is uncertain; after the "
        "longest of --answers the cost per step is taken as constant",
        ["earlier first token", "other"],
        ["falls behind at", "interval"],
    )
    for pair in pairs:
        table.add_row(pair["first"], pair["second"], tokens_or_never(pair["crossover"]), crossover_range(pair))
    show(table)


def tokens_or_never(value: float | None) -> str:
    return "never" if value is None else f"{value:,.0f}"


def crossover_range(pair: dict[str, Any]) -> str:
    """`[low, high]`; a dash if there are too few rounds for an interval."""
    if pair["rounds"] < DEFAULTS["rounds"]:
        return "–"
    if pair["low"] is None:
        return "never"
    return f"[{tokens_or_never(pair['low'])}, {tokens_or_never(pair['high'])}]"
