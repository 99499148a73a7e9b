"""`sink-eval sinks`: where attention goes, head by head; and at which of a run's checkpoints the sink appears.

`eval.measures.attention.sinks` measures it.
"""

from __future__ import annotations

import argparse

from eval.commands import options as shared
from eval.commands.checks import check_files, check_outputs
from eval.commands.output import give_result
from eval.commands.tables import new_table, number, show
from sinkmodel.console import put, say
from sinkmodel.errors import UserError
from sinkmodel.files import atomic_folder, refuse_if_occupied
from sinkmodel.imports import slow_imports
from sinkmodel.parser import path_of, positive, share
from sinkmodel.results.attention import SHARES, Birth, BirthResult, Peak, Shares, Sinks, SinksResult
from sinkmodel.sink_metric import BORN, EPSILON, LENGTH

DESCRIPTION = "Where attention goes: the sink metric, norms, massive activations and maps; or when a sink is born."
EXAMPLE = "sink-eval sinks --model runs/sink --text books-test.jsonl --maps runs/maps"
SHORTEST = 2  # text tokens of a sequence: the first, and one that can attend to it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser)
    shared.add_text(parser)
    parser.add_argument("--sequences", type=positive, default=100, metavar="N", help="pieces of text (default: 100)")
    parser.add_argument(
        "--length",
        type=positive,
        default=LENGTH,
        metavar="T",
        help=f"tokens of each piece, including sinks (default: {LENGTH})",
    )
    parser.add_argument(
        "--epsilon",
        type=share,
        default=EPSILON,
        metavar="E",
        help=f"α above which a head has a sink (default: {EPSILON})",
    )
    parser.add_argument(
        "--maps",
        type=path_of,
        metavar="FOLDER",
        help="write the averaged maps of the first 16 positions to this new folder",
    )
    parser.add_argument(
        "--heads",
        type=_head,
        nargs="+",
        metavar="LAYER.HEAD",
        help="heads that --maps draws (default: head 0 of the layers in StreamingLLM's Figure 2)",
    )
    parser.add_argument(
        "--checkpoints",
        action="store_true",
        help="measure every checkpoint of the run --model, and report when its sink is born",
    )
    parser.add_argument(
        "--born",
        type=share,
        metavar="SHARE",
        help="with --checkpoints: the sink is born when the share of heads that have it rises above this and stays "
        f"there (default: {BORN})",
    )
    shared.add_common(parser)


def _head(text: str) -> tuple[int, int]:
    layer, _, head = text.partition(".")
    if not (text.isascii() and layer.isdigit() and head.isdigit()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not LAYER.HEAD, such as 2.0 for the first head of the third layer"
        )
    return int(layer), int(head)


def run(options: argparse.Namespace) -> None:
    _check(options)
    with slow_imports():
        from eval.measures.attention import sinks

    if options.maps is not None:  # before the measurement, since matplotlib may be missing
        from eval.report.maps import papers_heads, write_maps
    if options.checkpoints:
        birth = sinks.over_checkpoints(options, SHORTEST, BORN if options.born is None else options.born)
        give_result(options, birth, lambda: print_checkpoints(birth))
        return
    result, means = sinks.run(options, SHORTEST)
    give_result(options, result, lambda: print_layers(result))
    if options.maps is not None:
        with atomic_folder(options.maps) as aside:
            write_maps(aside, means, options.heads or papers_heads(len(means)), len(result.sink_ids))
        say(f"wrote {options.maps / 'maps.png'} and maps.csv")


def _check(options: argparse.Namespace) -> None:
    if options.length < SHORTEST:
        raise UserError(f"--length {options.length} is too short to measure attention; use at least {SHORTEST}")
    if options.checkpoints and options.maps is not None:
        raise UserError("--maps draws one model; leave out --checkpoints, or give one checkpoint file as --model")
    if options.heads is not None and options.maps is None:
        raise UserError("--heads chooses what --maps draws; add --maps FOLDER")
    if options.born is not None and not options.checkpoints:
        raise UserError("--born needs --checkpoints; add it, with a run folder as --model")
    check_files(options.text)
    check_outputs(options)
    if options.maps is not None:
        refuse_if_occupied(options.maps)


# ------------------------------------------------------------------------------------------------------ what is shown


def _columns(has_sink: bool) -> list[str]:
    targets = ("sink", "first") if has_sink else ("first",)
    names = [name for target in targets for name in (f"α {target}", "heads")]
    return [*names, *(f"→ {target}" for target in (*targets, "rest"))]


def _cells(row: Shares, has_sink: bool) -> list[str]:
    names = [name for name in SHARES if has_sink or not name.startswith("sink")]
    return [number(row.shares[name], "0.1%" if name.endswith("heads") else "0.3f") for name in names]


def _peak(row: Peak) -> list[str]:
    location = f"{row.largest_place}, {row.largest_dimension}"
    return [f"{row.largest:,.1f}", location, number(row.times_median, ",.0f") + "!" * bool(row.massive)]


def _caption(result: Sinks) -> str:
    return (
        f"α: mean over queries i ≥ k of A(i, k); heads: share of heads with α above {result.epsilon:g}; →: share "
        "of attention of the queries after the first text token; |k|, |v|: norms; |h|: largest activation that a layer "
        "reads, its position and dimension, and its ratio to the median (!: massive, after Sun et al.)"
    )


def _title(result: Sinks) -> str:
    return f"{result.model}, {result.dtype}, {result.sequences} sequences of {result.length} tokens"


def print_layers(result: SinksResult) -> None:
    assert result.overall is not None
    has_sink = result.overall.sink_alpha is not None
    at = "sink" if has_sink else "first"
    norms = [f"|k| {at}", "rest", f"|v| {at}", "rest"]
    columns = [*_columns(has_sink), *norms, "|h|", "at", "× med."]
    table = new_table(_title(result), _caption(result), ["layer"], columns)
    for row in result.rows:
        values = [getattr(row, f"{name}_{part}") for name in ("key_norm", "value_norm") for part in (at, "rest")]
        table.add_row(str(row.layer), *_cells(row, has_sink), *(number(x, "0.2f") for x in values), *_peak(row))
    table.add_section()
    table.add_row("all", *_cells(result.overall, has_sink), *[""] * len(norms), *_peak(result.overall))
    show(table)


def print_checkpoints(result: BirthResult) -> None:
    has_sink = result.rows[0].sink_alpha is not None
    columns = ["tokens", *_columns(has_sink), "|h|", "at", "× med."]
    table = new_table(_title(result), _caption(result), ["step"], columns)
    for row in result.rows:
        table.add_row(str(row.step), f"{row.tokens:,}", *_cells(row, has_sink), *_peak(row))
    show(table)
    put(birth_notice(result.born, result.rows[0].step))


def birth_notice(birth: Birth, first_step: int) -> str:
    target = "the first text token" if birth.target == "first" else "the model's sink"
    criterion = f"more than {birth.threshold:.0%} of heads with a sink at {target}"
    if birth.step is None:
        return f"no sink is born: the last checkpoint does not have {criterion}"
    when = f"step {birth.step} ({birth.tokens:,} tokens)"
    if birth.step == first_step:
        return f"the sink is there at the first checkpoint, {when}, and stays: {criterion}"
    return f"the sink is born at {when}: from then on every checkpoint has {criterion}"
