"""`sink-eval verify`: is one trained sink worth four borrowed ones?

The sink model streams with its own sinks, 1+(C−1), a vanilla model with the four that StreamingLLM keeps, 4+(C−4), over
the same text; the answer is about the paired difference of their losses on the tokens that have overflowed in both
(design, decision 9): *equivalent*, *better*, *worse* or *undecided* (`eval.measures.verdict.equivalence.decide`).

One interval gives all four answers. It is two-sided at --level, so that "equivalent" is two one-sided tests, each at
half of what is left: 2.5 % at the level of 0.95, stricter than the customary 5 %, which --level 0.9 gives.
"""

from __future__ import annotations

import argparse
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eval.measures.command import (
    MODEL_HELP,
    add_common_arguments,
    check_output,
    load,
    new_table,
    number,
    show,
    write_result,
)
from eval.measures.texts import add_text_argument, check_files, check_positions, check_same_tokens, read_texts
from eval.policies.choice import BORROWED, check
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.parser import positive, real, whole

if TYPE_CHECKING:
    from eval.measures.verdict.paired import Documents
    from sinkmodel.loading import LoadedModel

DESCRIPTION = (
    """Is one trained sink worth four borrowed ones? Exit code 0: equivalent or better; 1: worse or undecided."""
)
EXAMPLE = "sink-eval verify --sink runs/token --vanilla runs/none --text books-test.jsonl --budget 256"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sink", required=True, metavar="NAME", help=f"the model with a sink: {MODEL_HELP}")
    parser.add_argument("--vanilla", required=True, metavar="NAME", help="its twin without one")
    add_text_argument(parser, "--texts")
    parser.add_argument(
        "--budget", type=positive, default=256, metavar="C", help="keys a query sees, the sinks counted"
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
        help="of the two-sided interval (default: 0.95); 0.9 makes equivalence two one-sided tests at the usual 5 %%",
    )
    parser.add_argument("--tokens", type=positive, metavar="N", help="text tokens of each document (default: all)")
    parser.add_argument(
        "--beside",
        type=positive,
        default=1 << 16,
        metavar="N",
        help="text tokens for each comparison within a model, beside the verdict (default: 65536)",
    )
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of the resampling")
    parser.add_argument(
        "--chunk", type=positive, default=256, metavar="N", help="queries computed together; changes the speed alone"
    )
    add_common_arguments(parser)


def run(options: argparse.Namespace) -> int:
    check([BORROWED], options.budget)
    if options.tokens is not None and options.tokens <= options.budget:
        raise UserError(
            f"--tokens {options.tokens} does not overflow --budget {options.budget}; raise one or lower the other"
        )
    check_files(options.text)
    check_output("--json", options.json)
    from eval.measures.verdict.paired import Question, Side, measure, streaming

    loaded = load(options, options.sink)
    sink = Side("sink", loaded, len(loaded.sink_ids))
    vanilla = Side("vanilla", load(options, options.vanilla), BORROWED)
    _check_pair(sink.loaded, vanilla.loaded)
    check([sink.sinks], options.budget)
    check_same_tokens(sink.loaded, vanilla.loaded, options.text)
    texts, ids = read_texts(vanilla.loaded, options.text, options.budget, options.tokens, None)
    documents = [array("i", document) for document in ids]
    del ids
    for side in (sink, vanilla):
        check_positions(side.loaded, documents, options.budget, [streaming(side.sinks, options.budget)])
    _check_length(documents, options.budget)
    warnings = _warnings(options, texts, documents)
    for warning in warnings:
        say(f"warning: {warning}")
    question = Question(options.budget, options.margin, options.level, options.seed, options.chunk)
    verdict, comparisons, rows = measure(sink, vanilla, documents, question, options.beside)
    content = {
        "command": "verify",
        "sink": options.sink,
        "vanilla": options.vanilla,
        "sink_ids": sink.front,
        "budget": options.budget,
        "margin": options.margin,
        "level": options.level,
        "seed": options.seed,
        "chunk": options.chunk,
        "dtype": options.dtype,
        "device": str(sink.loaded.model.device),
        "texts": texts,
        "warnings": warnings,
        "verdict": verdict,
        "comparisons": comparisons,
        "rows": rows,
    }
    print_tables(content)
    if options.json is not None:
        write_result(options.json, content)
    return 0 if verdict["answer"] in ("equivalent", "better") else 1


def _margin(text: str) -> float:
    if real(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return float(text)


def _level(text: str) -> float:
    if not 0.5 <= real(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no level; give one from 0.5 to below 1, as 0.95")
    return float(text)


# ------------------------------------------------------------------------------------------------------ what is checked


def _check_pair(sink: LoadedModel, vanilla: LoadedModel) -> None:
    from sinkmodel.sinks import kind_of

    of_sink, of_vanilla = kind_of(sink.model.config), kind_of(vanilla.model.config)
    if of_sink == "none" and of_vanilla != "none":
        raise UserError(
            f"--sink {sink.name} has no sink and --vanilla {vanilla.name} has one ({of_vanilla}): they are the "
            "wrong way round; exchange them"
        )
    if of_sink == "none":
        raise UserError(f"--sink {sink.name} has no sink of its own; give a model that was trained with one")
    if of_vanilla != "none":
        raise UserError(
            f"--vanilla {vanilla.name} has a sink ({of_vanilla}); give the twin that was trained without one"
        )


def _check_length(documents: Documents, budget: int) -> None:
    """Whether there is enough text for an interval, known before anything is scored."""
    from eval.measures.verdict.equivalence import BLOCKS, DOCUMENTS, enough

    lengths = [max(0, len(ids) - 1 - budget) for ids in documents]
    if not enough(lengths, budget):
        raise UserError(
            f"--text is too short for an interval: {sum(lengths)} tokens after overflow in {len(documents)} documents; "
            f"give {DOCUMENTS} documents of like length, one of {(BLOCKS + 1) * budget + 1} tokens or more, or lower "
            f"--budget {budget}"
        )


def _warnings(options: argparse.Namespace, texts: Sequence[dict[str, Any]], documents: Documents) -> list[str]:
    """What the models' provenance says against trusting the answer."""
    from eval.measures.verdict.training_text import not_twins, provenance_of, trained_on

    provenances = {name: provenance_of(name) for name in (options.sink, options.vanilla)}
    warnings = []
    if ways := not_twins(*(provenances[name] for name in (options.sink, options.vanilla))):
        warnings.append(f"{options.sink} and {options.vanilla} are no twins: {', '.join(ways)}")
    for name, provenance in provenances.items():
        if not provenance.get("data"):
            continue
        known = trained_on(provenance, documents)
        if known is None:
            warnings.append(f"{name}: its training data is not where it was, so nobody checked whether --text is in it")
            continue
        first = 0
        for text in texts:
            count = sum(known[first : first + text["documents"]])
            first += text["documents"]
            if count:
                warnings.append(
                    f"{name} was trained on {text['file']}: {count} of {text['documents']} documents begin as training "
                    "documents do; give text that was held out"
                )
    return warnings


# ------------------------------------------------------------------------------------------------------ what is shown


def print_tables(content: dict[str, Any]) -> None:
    verdict = content["verdict"]
    table = new_table(
        f"C = {content['budget']}, {content['dtype']}, after overflow",
        "±: standard error over blocks of C tokens",
        ["model", "policy"],
        ["keys seen", "texts", "tokens", "nll ≥C", "± ≥C", "ppl ≥C"],
    )
    for row in content["rows"]:
        table.add_row(
            row["model"],
            row["label"],
            str(row["keys_seen"]),
            str(row["documents"]),
            f"{row['tokens_after_overflow']:,}",
            *(number(row[key], "0.4f") for key in ("nll_after_overflow", "stderr_after_overflow")),
            number(row["ppl_after_overflow"], ",.2f"),
        )
    show(table)
    table = new_table(
        f"paired differences in nats per token, {100 * content['level']:g} % intervals",
        f"first − second: below zero the first loses less; equivalent: within ±{content['margin']:g}; "
        "recompute and dense: at places spread over the texts",
        ["model", "first", "second"],
        ["tokens", "difference", "interval", "answer"],
    )
    for row in [{"model": "both", **verdict}, *content["comparisons"]]:
        names = [row["first"], row["second"]]
        table.add_row(
            row["model"],
            *names,
            f"{row['tokens']:,}",
            number(row["difference"], "+.4f"),
            f"[{row['low']:+.4f}, {row['high']:+.4f}]" if row["low"] is not None else "–",
            row["answer"] or row.get("why", "too little text"),
        )
    show(table)
    print(in_words(verdict, content["margin"]))


def in_words(verdict: dict[str, Any], margin: float) -> str:
    """The verdict as a sentence or two."""
    said = (
        f"{verdict['answer']}: {verdict['first']} − {verdict['second']} = {verdict['difference']:+.4f} nats per token, "
        f"{100 * verdict['level']:g} % interval [{verdict['low']:+.4f}, {verdict['high']:+.4f}], margin ±{margin:g}"
    )
    documents = "1 document" if verdict["documents"] == 1 else f"{verdict['documents']} documents"
    if verdict["resampled"] == "blocks":
        said += f"\n{documents}: too few, or too unlike in length, to resample; it speaks of these texts, not of others"
    if verdict["more_tokens"]:
        said += f"\nabout {verdict['more_tokens']:,} more tokens would decide, if the difference stayed as it is"
    return f"{said}\nit speaks of these two runs; twins of other seeds may differ by more: sink-eval grid takes several"
