"""`sink-eval sinks`: where attention goes, head by head; and at which of a run's checkpoints the sink appears.

The sink metric is that of Gu et al. (arXiv 2410.10781); `sinkmodel.sink_metric` defines it. It is reported for the
first text token and for the model's own sink. `shares` computes the numbers, `sequences` selects the texts, and
`sinkmodel.maps` extracts the attention maps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.measures.command import (
    MODEL_HELP,
    add_common_arguments,
    check_output,
    give_result,
    load,
    new_table,
    number,
    show,
)
from eval.measures.texts import add_text_argument, check_files
from sinkmodel.console import put, say
from sinkmodel.errors import UserError, not_finite
from sinkmodel.files import atomic_folder, refuse_if_occupied
from sinkmodel.parser import name_of, path_of, positive, share
from sinkmodel.progress import CountedProgress
from sinkmodel.sink_metric import BORN, EPSILON, LENGTH, born

if TYPE_CHECKING:
    from torch import Tensor

    from sinkmodel.loading import LoadedModel

DESCRIPTION = "Where attention goes: the sink metric, norms, massive activations and maps; or when a sink is born."
EXAMPLE = "sink-eval sinks --model runs/sink --text books-test.jsonl --maps runs/maps"
SHORTEST = 2  # text tokens of a sequence: the first, and one that can attend to it
TOKENS_AT_ONCE = 2048  # tokens of one forward; their hidden states are held for all layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=name_of, required=True, metavar="NAME", help=MODEL_HELP)
    add_text_argument(parser)
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
    add_common_arguments(parser)


def _head(text: str) -> tuple[int, int]:
    layer, _, head = text.partition(".")
    if not (text.isascii() and layer.isdigit() and head.isdigit()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not LAYER.HEAD, such as 2.0 for the first head of the third layer"
        )
    return int(layer), int(head)


def run(options: argparse.Namespace) -> None:
    _check(options)
    checkpoints = _checkpoints(Path(options.model)) if options.checkpoints else {}
    if options.maps is not None:
        import eval.report.maps  # noqa: F401  # fails before the measurement if matplotlib is missing
    from eval.measures.attention.sequences import read_sequences
    from eval.measures.attention.shares import results

    name = str(next(iter(checkpoints))) if checkpoints else options.model
    loaded = load(options, name)
    heads = _check_model(loaded, options)
    texts, sequences = read_sequences(loaded, options.text, options.sequences, options.length)
    content = {
        "command": "sinks",
        "model": options.model,
        "sink_ids": loaded.sink_ids,
        "length": options.length,
        "sequences": len(sequences),
        "epsilon": options.epsilon,
        "dtype": options.dtype,
        "device": str(loaded.model.device),
        "texts": texts,
    }
    if checkpoints:
        content |= _run_checkpoints(options, loaded, checkpoints, sequences)
        give_result(options, content, lambda: print_checkpoints(content))
    else:
        means = measure(loaded, sequences, options.epsilon, "sinks")
        content |= results(means, len(loaded.sink_ids), own_key_norms(loaded.model))
        give_result(options, content, lambda: print_layers(content))
        if options.maps is not None:
            _write_maps(options.maps, means, heads, len(loaded.sink_ids))


# ---------------------------------------------------------------------------------------------------- what is checked


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
    check_output("--json", options.json)
    if options.maps is not None:
        refuse_if_occupied(options.maps)


def _checkpoints(run: Path) -> dict[Path, tuple[int, int]]:
    """The checkpoints of a run in order of steps, each with (step, tokens seen). Raises UserError if one is damaged."""
    from sinkmodel.checkpoint import Recipe, checkpoint_steps, find_checkpoint, read_checkpoint

    if not run.is_dir():
        raise UserError(f"--checkpoints needs a run folder as --model; {run} is not a folder")
    find_checkpoint(run)
    recipes = {path: Recipe.from_dict(read_checkpoint(path)["recipe"]) for path in checkpoint_steps(run).values()}
    return {path: (recipe.step, recipe.tokens) for path, recipe in recipes.items()}


def _check_model(loaded: LoadedModel, options: argparse.Namespace) -> list[tuple[int, int]] | None:
    """Return the heads to draw (None: the default). Raises UserError for heads or positions that the model lacks."""
    sinks = len(loaded.sink_ids)
    if options.length < sinks + SHORTEST:
        raise UserError(
            f"--length {options.length} leaves too little text after the model's {sinks} sink tokens; "
            f"use at least {sinks + SHORTEST}"
        )
    if loaded.positions is not None and options.length > loaded.positions:
        raise UserError(
            f"--length {options.length} is longer than the {loaded.positions} positions that {loaded.name} was made "
            f"for; use {loaded.positions} or less"
        )
    config = loaded.model.config.get_text_config()
    for layer, head in options.heads or ():
        if layer >= config.num_hidden_layers or head >= config.num_attention_heads:
            raise UserError(
                f"--heads {layer}.{head}: {loaded.name} has layers 0 to {config.num_hidden_layers - 1} with heads 0 to "
                f"{config.num_attention_heads - 1}"
            )
    return options.heads


# --------------------------------------------------------------------------------------------------- what is measured


def measure(loaded: LoadedModel, sequences: list[list[int]], epsilon: float, label: str) -> list[dict[str, Tensor]]:
    """For each layer the means of `layer_sums` over sequences. Raises UserError if the model cannot be watched."""
    import torch

    from eval.measures.attention.shares import Tally
    from sinkmodel.maps import watch

    model = loaded.model
    tally = Tally(len(loaded.sink_ids), epsilon)
    rows = max(1, TOKENS_AT_ONCE // len(sequences[0]))
    with CountedProgress(label, "tokens", sum(map(len, sequences))) as progress:
        for ids_BT in torch.tensor(sequences).split(rows):
            output = watch(model, ids_BT.to(model.device), tally.see, output_hidden_states=True)
            tally.end_batch(len(ids_BT), output.hidden_states[:-1])
            progress.add(ids_BT.numel())
    means = tally.means()
    if not all(
        bool(torch.isfinite(mean[name]).all()) for mean in means for name in ("peak", "first_alpha", "key_norm")
    ):
        raise UserError(f"{loaded.name}: {not_finite(model, 'attention maps')}")
    return means


def own_key_norms(model: Any) -> list[float | None]:
    """For each layer the norm of the key of a sink in the softmax, averaged over the KV heads; None without a key."""
    from sinkmodel.sinks import kind_of

    if kind_of(model.config) == "kv_bias":
        from sinkmodel.softmax_sinks.architectures import attentions_of

        keys_GD: list[Any] = [module.sink for module in attentions_of(model)]
        return [key_GD.float().norm(dim=-1).mean().item() for key_GD in keys_GD]
    return [0.0 if kind_of(model.config) == "zero" else None] * model.config.get_text_config().num_hidden_layers


def _run_checkpoints(
    options: argparse.Namespace,
    loaded: LoadedModel,
    checkpoints: dict[Path, tuple[int, int]],
    sequences: list[list[int]],
) -> dict[str, Any]:
    """One row per checkpoint, with its layers and heads, and when the sink is born. `loaded`: the first checkpoint."""
    from eval.measures.attention.shares import results

    rows: list[dict[str, Any]] = []
    for i, (path, (step, tokens)) in enumerate(checkpoints.items(), 1):
        if i > 1:
            loaded = load(options, str(path))
        means = measure(loaded, sequences, options.epsilon, f"{i}/{len(checkpoints)} step {step}")
        found = results(means, len(loaded.sink_ids), own_key_norms(loaded.model))
        of_places = {"heads_by_place": found["heads_by_place"]}
        rows.append({"step": step, "tokens": tokens, **found["overall"], **of_places, "layers": found["rows"]})
    target = "first" if rows[0]["sink_heads"] is None else "sink"
    threshold = BORN if options.born is None else options.born
    step_of_birth = born([(row["step"], row[f"{target}_heads"]) for row in rows], threshold)
    tokens_then = next((row["tokens"] for row in rows if row["step"] == step_of_birth), None)
    birth = {"target": target, "threshold": threshold, "step": step_of_birth, "tokens": tokens_then}
    return {"rows": rows, "born": birth}


# ------------------------------------------------------------------------------------------------------ what is shown


def _write_maps(folder: Path, means: list[dict[str, Tensor]], heads: list[tuple[int, int]] | None, sinks: int) -> None:
    from eval.report.maps import papers_heads, write_maps

    with atomic_folder(folder) as aside:
        write_maps(aside, means, heads or papers_heads(len(means)), sinks)
    say(f"wrote {folder / 'maps.png'} and maps.csv")


def _columns(has_sink: bool) -> list[str]:
    targets = ("sink", "first") if has_sink else ("first",)
    names = [name for target in targets for name in (f"α {target}", "heads")]
    return [*names, *(f"→ {target}" for target in (*targets, "rest"))]


def _cells(row: dict[str, Any], has_sink: bool) -> list[str]:
    from eval.measures.attention.shares import MEASURED

    names = [name for name in MEASURED if has_sink or not name.startswith("sink")]
    return [number(row[name], "0.1%" if name.endswith("heads") else "0.3f") for name in names]


def _peak(row: dict[str, Any]) -> list[str]:
    location = f"{row['largest_place']}, {row['largest_dimension']}"
    return [f"{row['largest']:,.1f}", location, number(row["times_median"], ",.0f") + "!" * row["massive"]]


def _caption(content: dict[str, Any]) -> str:
    return (
        f"α: mean over queries i ≥ k of A(i, k); heads: share of heads with α above {content['epsilon']:g}; →: share "
        "of attention of the queries after the first text token; |k|, |v|: norms; |h|: largest activation that a layer "
        "reads, its position and dimension, and its ratio to the median (!: massive, after Sun et al.)"
    )


def _title(content: dict[str, Any]) -> str:
    return f"{content['model']}, {content['dtype']}, {content['sequences']} sequences of {content['length']} tokens"


def print_layers(content: dict[str, Any]) -> None:
    has_sink = content["overall"]["sink_alpha"] is not None
    at = "sink" if has_sink else "first"
    norms = [f"|k| {at}", "rest", f"|v| {at}", "rest"]
    columns = [*_columns(has_sink), *norms, "|h|", "at", "× med."]
    table = new_table(_title(content), _caption(content), ["layer"], columns)
    for row in content["rows"]:
        values = [row[f"{name}_{part}"] for name in ("key_norm", "value_norm") for part in (at, "rest")]
        table.add_row(str(row["layer"]), *_cells(row, has_sink), *(number(x, "0.2f") for x in values), *_peak(row))
    table.add_section()
    table.add_row("all", *_cells(content["overall"], has_sink), *[""] * len(norms), *_peak(content["overall"]))
    show(table)


def print_checkpoints(content: dict[str, Any]) -> None:
    has_sink = content["rows"][0]["sink_alpha"] is not None
    columns = ["tokens", *_columns(has_sink), "|h|", "at", "× med."]
    table = new_table(_title(content), _caption(content), ["step"], columns)
    for row in content["rows"]:
        table.add_row(str(row["step"]), f"{row['tokens']:,}", *_cells(row, has_sink), *_peak(row))
    show(table)
    put(birth_notice(content["born"], content["rows"][0]["step"]))


def birth_notice(birth: dict[str, Any], first_step: int) -> str:
    target = "the first text token" if birth["target"] == "first" else "the model's sink"
    criterion = f"more than {birth['threshold']:.0%} of heads with a sink at {target}"
    if birth["step"] is None:
        return f"no sink is born: the last checkpoint does not have {criterion}"
    when = f"step {birth['step']} ({birth['tokens']:,} tokens)"
    if birth["step"] == first_step:
        return f"the sink is there at the first checkpoint, {when}, and stays: {criterion}"
    return f"the sink is born at {when}: from then on every checkpoint has {criterion}"
