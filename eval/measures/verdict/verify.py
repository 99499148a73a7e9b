"""`sink-eval verify`: is one trained sink worth four borrowed ones?

Two models stream over the same text: the sink model with its own sinks, 1+(C−1), and a vanilla model with the four
tokens that StreamingLLM keeps, 4+(C−4). The answer is about the paired difference of their losses on the tokens that
have overflowed in both (DESIGN.md, "A claim has an interval"): *equivalent*, *better*, *worse* or *undecided*
(`eval.measures.verdict.equivalence.decide`).

One interval gives all four answers. It is two-sided at --level, so "equivalent" is two one-sided tests, each at
(1 − level) / 2. At the default level of 0.95 this is 2.5 %, stricter than the usual 5 %, which --level 0.9 gives.

With several pairs of twin runs, which differ only in their seeds, the interval holds for other runs as well as for
other texts. With one pair, the verdict is about these two checkpoints only. If the documents weigh less than five of
one length, they cannot represent other texts. Then the answer is undecided, unless --these-texts asks about no others.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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
from eval.measures.texts import (
    add_text_argument,
    check_files,
    check_positions,
    check_same_tokens,
    fed,
    read_texts,
    repeated,
)
from eval.policies.choice import BORROWED, check
from sinkmodel.console import put, say
from sinkmodel.errors import UserError
from sinkmodel.parser import name_of, positive, real, whole

if TYPE_CHECKING:
    from eval.measures.verdict.paired import Documents, Side
    from eval.measures.verdict.training import Provenance
    from sinkmodel.loading import LoadedModel

DESCRIPTION = "Is one trained sink worth four borrowed ones? Exit code 0: equivalent or better; 1: worse or undecided."
EXAMPLE = (
    "sink-eval verify --sink runs/token-1 runs/token-2 --vanilla runs/none-1 runs/none-2 --text books-test.jsonl "
    "--budget 256"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sink",
        type=name_of,
        required=True,
        nargs="+",
        metavar="NAME",
        help=f"the model with a sink, or several, one per seed: {MODEL_HELP}",
    )
    parser.add_argument(
        "--vanilla",
        type=name_of,
        required=True,
        nargs="+",
        metavar="NAME",
        help="its twin without a sink, or several, in the same order; or one for all, the model that all started from",
    )
    add_text_argument(parser, "--texts")
    parser.add_argument(
        "--budget", type=positive, default=256, metavar="C", help="keys a query sees, including the sinks"
    )
    parser.add_argument(
        "--margin",
        type=_margin,
        default=0.01,
        metavar="NATS",
        help="differences in nats per token that do not matter (default: 0.01)",
    )
    parser.add_argument(
        "--level",
        type=_level,
        default=0.95,
        metavar="P",
        help="level of the two-sided interval (default: 0.95); with 0.9 equivalence is tested at the usual 5 %% on "
        "each side",
    )
    parser.add_argument("--tokens", type=positive, metavar="N", help="text tokens of each document (default: all)")
    parser.add_argument(
        "--these-texts",
        action="store_true",
        help="answer only for these texts, such as one long book; by default the answer is for other texts like them, "
        "and undecided if they weigh less than five documents of one length",
    )
    parser.add_argument(
        "--beside",
        type=positive,
        default=1 << 16,
        metavar="N",
        help="text tokens for each comparison within a model, which the verdict does not use (default: 65536)",
    )
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="random seed of the resampling (default: 0)")
    parser.add_argument(
        "--chunk", type=positive, default=256, metavar="N", help="queries computed together; changes only the speed"
    )
    add_common_arguments(parser)


def run(options: argparse.Namespace) -> int:
    check([BORROWED], options.budget)
    if options.tokens is not None and options.tokens <= options.budget:
        raise UserError(
            f"--tokens {options.tokens} does not overflow --budget {options.budget}; raise one or lower the other"
        )
    _check_names(options.sink, options.vanilla)
    check_files(options.text)
    check_output("--json", options.json)
    from eval.measures.verdict.paired import Question, answered, compared, measure

    names = _pairs(options)
    sides, texts, documents, provenances = _look(options, names)
    warnings = _warnings(options, provenances, texts, documents)
    for warning in warnings:
        say(f"warning: {warning}")
    question = Question(options.budget, options.margin, options.level, options.seed, options.chunk, options.these_texts)
    runs, rows = [], []
    vanilla = None
    for place, pair in enumerate(names):
        if place > 0:
            sides = _load(options, *pair, sides[1])
        if len(names) > 1:
            say(f"pair {place + 1}/{len(names)}: {pair[0]} and {pair[1]}")
        sink = measure(sides[0], documents, question, options.beside)
        if vanilla is None or pair[1] != names[place - 1][1]:  # a vanilla model shared by all pairs is scored once
            vanilla = measure(sides[1], documents, question, options.beside)
        of_run, of_streams = compared(sides, (sink, vanilla), options.budget)
        runs.append(of_run)
        rows += of_streams
    verdict, *comparisons = (answered(question, same) for same in zip(*runs))
    each = [{"sink": a, "vanilla": b, **answered(question, run[:1])} for (a, b), run in zip(names, runs)]
    content = {
        "command": "verify",
        "sink": ", ".join(options.sink),
        "vanilla": ", ".join(options.vanilla),
        "sink_ids": sides[0].front,
        "budget": options.budget,
        "margin": options.margin,
        "level": options.level,
        "seed": options.seed,
        "chunk": options.chunk,
        "these_texts": options.these_texts,
        "dtype": options.dtype,
        "device": str(sides[0].loaded.model.device),
        "texts": texts,
        "warnings": warnings,
        "verdict": verdict,
        "pairs": each,
        "comparisons": comparisons,
        "rows": rows,
    }
    give_result(options, content, lambda: print_tables(content))
    return 0 if verdict["answer"] in ("equivalent", "better") else 1


def _margin(text: str) -> float:
    if real(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return float(text)


def _level(text: str) -> float:
    if not 0.5 <= real(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a level; give a number from 0.5 to below 1, such as 0.95")
    return float(text)


# ------------------------------------------------------------------------------------------------------ what is checked


def _pairs(options: argparse.Namespace) -> list[tuple[str, str]]:
    """The names of the twins. A single vanilla model is the twin of all: runs that train only a sink share a base."""
    one_for_all = len(options.vanilla) == 1
    return list(zip(options.sink, options.vanilla * len(options.sink) if one_for_all else options.vanilla))


def _check_names(sinks: Sequence[str], vanillas: Sequence[str]) -> None:
    if len(vanillas) not in (1, len(sinks)):
        raise UserError(
            f"--sink has {len(sinks)} models and --vanilla has {len(vanillas)}; give pairs of twins in the same order"
        )
    for option, names in (("--sink", sinks), ("--vanilla", vanillas)):
        if twice := repeated(names):
            raise UserError(f"{option} has {twice} twice, which is not another seed")


def _look(
    options: argparse.Namespace, names: Sequence[tuple[str, str]]
) -> tuple[tuple[Side, Side], list[dict[str, Any]], Documents, dict[str, Provenance]]:
    """Load and check every pair once before any is scored.

    The first pair is loaded last, so that it stays loaded. Returns it, a summary of the texts, their tokens without
    sinks, and the provenance of each model.
    """
    from eval.measures.verdict.paired import streaming
    from eval.measures.verdict.training import training_of

    texts: list[dict[str, Any]] = []
    documents: Documents = []
    provenances: dict[str, Provenance] = {}
    alike: tuple[Side, Side] | None = None
    vanilla: Side | None = None
    for pair in reversed(names):
        sides = sink, vanilla = _load(options, *pair, vanilla)
        _check_pair(sink.loaded, vanilla.loaded)
        check([sink.sinks], options.budget)
        alike = alike or sides
        for side, other in zip(sides, alike):
            _check_alike(side.loaded, other.loaded)
            check_same_tokens(side.loaded, alike[1].loaded, options.text)
        if not documents:
            texts, documents = read_texts(vanilla.loaded, options.text, options.budget, options.tokens, None)
        for side in sides:
            check_positions(side.loaded, fed(documents), [streaming(side.sinks, options.budget)])
            provenances[side.loaded.name] = training_of(side.loaded)
    _check_length(documents, options.budget, options.these_texts)
    return sides, texts, documents, provenances


def _load(options: argparse.Namespace, sink: str, vanilla: str, before: Side | None = None) -> tuple[Side, Side]:
    """Load a pair. The vanilla model `before`, of the previous pair, is reused if it has the same name."""
    from eval.measures.verdict.paired import Side

    loaded = load(options, sink)
    if before is None or before.loaded.name != vanilla:
        before = Side("vanilla", load(options, vanilla), BORROWED)
    return Side("sink", loaded, len(loaded.sink_ids)), before


def _check_alike(one: LoadedModel, other: LoadedModel) -> None:
    """Raise UserError unless two runs have the same sinks and positions; the positions limit the dense comparison."""
    from sinkmodel.sinks import kind_of

    for quality, value_of in (
        ("sinks", lambda loaded: (kind_of(loaded.model.config), len(loaded.sink_ids))),
        ("positions", lambda loaded: loaded.positions),
    ):
        if value_of(one) != value_of(other):
            raise UserError(
                f"{one.name} and {other.name} differ in their {quality} ({value_of(one)} and {value_of(other)}); give "
                "runs that differ only in their seeds"
            )


def _check_pair(sink: LoadedModel, vanilla: LoadedModel) -> None:
    from sinkmodel.sinks import kind_of

    of_sink, of_vanilla = kind_of(sink.model.config), kind_of(vanilla.model.config)
    if of_sink == "none" and of_vanilla != "none":
        raise UserError(
            f"--sink {sink.name} has no sink and --vanilla {vanilla.name} has one ({of_vanilla}); they are "
            "swapped: exchange them"
        )
    if of_sink == "none":
        raise UserError(f"--sink {sink.name} has no sink of its own; give a model that was trained with one")
    if of_vanilla != "none":
        raise UserError(
            f"--vanilla {vanilla.name} has a sink ({of_vanilla}); give the twin that was trained without one"
        )


def _check_length(documents: Documents, budget: int, these_texts: bool) -> None:
    """Raise UserError if the text is too short for an interval; warn if it is too little for an answer."""
    from eval.measures.verdict.equivalence import BLOCKS, DOCUMENTS, enough, is_sample, no_sample

    lengths = [max(0, len(ids) - 1 - budget) for ids in documents]
    if not enough(lengths, budget, these_texts):
        of_like_length = "" if these_texts else f"{DOCUMENTS} documents of similar length, or "
        raise UserError(
            f"--text is too short for an interval: {sum(lengths)} tokens after overflow in {len(documents)} documents; "
            f"give {of_like_length}one of {(BLOCKS + 1) * budget + 1} tokens or more, or lower --budget {budget}"
        )
    if not these_texts and not is_sample(lengths):
        say(f"warning: {no_sample(lengths)}; the answer will be undecided")


def _warnings(
    options: argparse.Namespace,
    provenances: dict[str, Provenance],
    texts: Sequence[dict[str, Any]],
    documents: Documents,
) -> list[str]:
    """Reasons not to trust the answer, from the models' provenance."""
    from eval.measures.verdict.training import in_training, not_seeds, not_twins

    sinks, vanillas = ({name: provenances[name] for name in names} for names in (options.sink, options.vanilla))
    warnings = []
    for sink, vanilla in _pairs(options):
        if ways := not_twins(provenances[sink], provenances[vanilla]):
            warnings.append(f"{sink} and {vanilla} are not twins: {', '.join(ways)}")
    return [*warnings, *not_seeds(sinks), *not_seeds(vanillas), *in_training(sinks | vanillas, texts, documents)]


# ------------------------------------------------------------------------------------------------------ what is shown


def print_tables(content: dict[str, Any]) -> None:
    verdict = content["verdict"]
    table = new_table(
        f"C = {content['budget']}, {content['dtype']}, after overflow",
        "±: standard error over blocks of C tokens",
        ["model", "run", "policy"],
        ["keys seen", "texts", "tokens", "nll ≥C", "± ≥C", "ppl ≥C"],
    )
    for row in content["rows"]:
        table.add_row(
            row["model"],
            row["run"],
            row["label"],
            str(row["keys_seen"]),
            str(row["documents"]),
            f"{row['tokens_after_overflow']:,}",
            *(number(row[key], "0.4f") for key in ("nll_after_overflow", "stderr_after_overflow")),
            number(row["ppl_after_overflow"], ",.2f"),
        )
    show(table)
    table = new_table(
        f"paired differences in nats per token, {100 * content['level']:g} % intervals"
        + (f", over {verdict['runs']} pairs of runs" if verdict["runs"] > 1 else ""),
        f"first − second: below zero the first has the lower loss; equivalent: within ±{content['margin']:g}; "
        "recompute and dense: at positions spread over the texts",
        ["model", "first", "second"],
        ["tokens", "difference", "interval", "answer"],
    )
    for row in [verdict, *each_pair(content), *content["comparisons"]]:
        table.add_row(
            row["model"],
            row["first"],
            row["second"],
            f"{row['tokens']:,}",
            number(row["difference"], "+.4f"),
            f"[{row['low']:+.4f}, {row['high']:+.4f}]" if row["low"] is not None else "–",
            answer_cell(row),
        )
    show(table)
    put(in_words(verdict, content["margin"]))


def each_pair(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The verdict of each pair of runs, as rows of the table of comparisons; empty if there is only one pair."""
    pairs = content.get("pairs", [])
    return [{**row, "model": "pair", "first": row["sink"], "second": row["vanilla"]} for row in pairs if len(pairs) > 1]


def answer_cell(row: dict[str, Any]) -> str:
    """The answer of a row for a table; it names the texts that the answer is for unless that is the default."""
    if not row["answer"]:
        return row.get("why") or "too little text"
    if row.get("why"):
        return f"{row['answer']} for other texts"
    return f"{row['answer']} for these texts" if row.get("speaks_of") == "these texts" else str(row["answer"])


def in_words(verdict: dict[str, Any], margin: float) -> str:
    """The verdict in a few sentences."""
    text = (
        f"{verdict['answer']}: {verdict['first']} − {verdict['second']} = {verdict['difference']:+.4f} nats per token, "
        f"{100 * verdict['level']:g} % interval [{verdict['low']:+.4f}, {verdict['high']:+.4f}], margin ±{margin:g}"
    )
    if verdict.get("why"):
        text += f"\n{verdict['why']}"
    if verdict["resampled"] == "blocks":
        text += "\nthe interval holds for these texts, not for others"
    if verdict["more_tokens"]:
        text += f"\nabout {verdict['more_tokens']:,} more tokens would decide, if the difference stayed the same"
    if verdict["runs"] == 1:
        return f"{text}\nit holds for these two runs; twins of other seeds may differ by more: give several of each"
    runs, texts = verdict["stderr_runs"], verdict["stderr_texts"]
    text += f"\nof {verdict['runs']} pairs of runs; standard error over runs {runs:.4f}, over texts {texts:.4f}: "
    if verdict["more_tokens"] is None and not verdict.get("why"):
        return f"{text}no amount of text decides this, more pairs of runs would"
    return f"{text}more {'pairs' if runs > texts else 'texts'} would narrow it most"
