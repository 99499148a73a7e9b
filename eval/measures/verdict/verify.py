"""The verdict on pairs of models (`sink-eval verify`): is one trained sink worth four borrowed ones?

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

from eval.measures.loading import load
from eval.measures.texts import check_positions, check_same_tokens, fed, read_texts
from eval.measures.verdict.equivalence import BLOCKS, DOCUMENTS, enough, is_sample, no_sample
from eval.measures.verdict.paired import Documents, Question, Side, answered, compared, measure, streaming
from eval.measures.verdict.training import Provenance, in_training, not_seeds, not_twins, training_of
from eval.policies.options import BORROWED, check
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.loading import LoadedModel
from sinkmodel.results.parts import Text
from sinkmodel.results.verdict import PairVerdict, Verdict, VerdictResult
from sinkmodel.sinks import kind_of


def run(options: argparse.Namespace) -> VerdictResult:
    """The result. `options` are those of `eval.commands.verify`."""
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
    each = [PairVerdict(sink=a, vanilla=b, **vars(answered(question, run[:1]))) for (a, b), run in zip(names, runs)]
    return VerdictResult(
        sink=", ".join(options.sink),
        vanilla=", ".join(options.vanilla),
        sink_ids=sides[0].front,
        budget=options.budget,
        margin=options.margin,
        level=options.level,
        seed=options.seed,
        chunk=options.chunk,
        these_texts=options.these_texts,
        dtype=options.dtype,
        device=str(sides[0].loaded.model.device),
        texts=texts,
        warnings=warnings,
        verdict=Verdict(**vars(verdict)),
        pairs=each,
        comparisons=comparisons,
        rows=rows,
    )


def _pairs(options: argparse.Namespace) -> list[tuple[str, str]]:
    """The names of the twins. A single vanilla model is the twin of all: runs that train only a sink share a base."""
    one_for_all = len(options.vanilla) == 1
    return list(zip(options.sink, options.vanilla * len(options.sink) if one_for_all else options.vanilla))


def _look(
    options: argparse.Namespace, names: Sequence[tuple[str, str]]
) -> tuple[tuple[Side, Side], list[Text], Documents, dict[str, Provenance]]:
    """Load and check every pair once before any is scored.

    The first pair is loaded last, so that it stays loaded. Returns it, a summary of the texts, their tokens without
    sinks, and the provenance of each model.
    """
    texts: list[Text] = []
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
    loaded = load(options, sink)
    if before is None or before.loaded.name != vanilla:
        before = Side("vanilla", load(options, vanilla), BORROWED)
    return Side("sink", loaded, len(loaded.sink_ids)), before


def _check_alike(one: LoadedModel, other: LoadedModel) -> None:
    """Raise UserError unless two runs have the same sinks and positions; the positions limit the dense comparison."""
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
    texts: Sequence[Text],
    documents: Documents,
) -> list[str]:
    """Reasons not to trust the answer, from the models' provenance."""
    sinks, vanillas = ({name: provenances[name] for name in names} for names in (options.sink, options.vanilla))
    warnings = []
    for sink, vanilla in _pairs(options):
        if ways := not_twins(provenances[sink], provenances[vanilla]):
            warnings.append(f"{sink} and {vanilla} are not twins: {', '.join(ways)}")
    return [*warnings, *not_seeds(sinks), *not_seeds(vanillas), *in_training(sinks | vanillas, texts, documents)]
