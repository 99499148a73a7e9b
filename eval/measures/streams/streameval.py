"""What a stream remembers of what it read some time ago, and how well it answers questions (`sink-eval streameval`).

Two tasks of StreamingLLM (arXiv 2309.17453, section 4.3), whose data and code were never released:

    lines      StreamEval, Figures 8 and 9 and Table 7: a record that grows without end. Every 10 lines a query asks
               about the line 20 before it. Measures accuracy by distance and budget (`eval.measures.streams.lines`)
    questions  Table 5: questions one after the other in one stream, compared to each question in an empty cache. The
               questions come from a file or are made up (`eval.measures.streams.questions`)

After each question the stream continues with the right answer, whatever the model would answer. Answers are scored on
copies of the stream, so scoring does not change it. On lines, accuracy is an exact match under greedy decoding. For
small base models the nats of the answer and its rank among other numbers are more informative.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from eval.measures.loading import load
from eval.measures.streams.answers import measure_lines, measure_questions
from eval.measures.streams.lines import Record
from eval.measures.streams.questions import BETWEEN, Asked, Question, in_tokens, make_questions, read_questions
from eval.measures.texts import check_positions
from eval.policies.caches import Dense
from eval.policies.choice import choose
from eval.policies.options import BORROWED, check
from eval.policies.policy import Policy, refuse_narrower_window
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.files import sha256_of
from sinkmodel.loading import LoadedModel, encode
from sinkmodel.results.parts import Text
from sinkmodel.results.streams import LinesResult, LinesRow, QuestionsResult, QuestionsRow, StreamEvalResult


def run(options: argparse.Namespace) -> StreamEvalResult:
    """The result. `options` are those of `eval.commands.streameval`, with the defaults of the task filled in."""
    asked = read_questions(options.file, options.queries) if options.file else []
    loaded = load(options)
    policies = _policies(options, loaded)
    if options.task == "lines":
        return _run_lines(options, loaded, policies)
    return _run_questions(options, loaded, policies, asked or make_questions(options.seed, options.queries))


def _setting(options: argparse.Namespace, loaded: LoadedModel) -> dict[str, Any]:
    """The fields of a result that both tasks share."""
    return {
        "model": options.model,
        "sink_ids": loaded.sink_ids,
        "seed": options.seed,
        "dtype": options.dtype,
        "device": str(loaded.model.device),
    }


def _run_lines(options: argparse.Namespace, loaded: LoadedModel, policies: list[Policy]) -> LinesResult:
    record = Record(loaded)
    samples = {
        distance: [
            record.sample(options.seed, n, distance, options.every, options.queries, options.distractors)
            for n in range(options.samples)
        ]
        for distance in dict.fromkeys(options.distances)
    }
    _check_stream(loaded, policies, max(streams[0][-1].place for streams in samples.values()) + record.answer_tokens)
    rows: list[LinesRow] = []
    for policy in policies:
        for distance, streams in samples.items():
            label = f"{len(rows) + 1}/{len(policies) * len(samples)} {policy.label}, {distance} lines back"
            row = measure_lines(loaded.model, policy, streams, options.rows, label)
            rows.append(replace(row, distance=distance))
    least, most = record.line_tokens(max(samples), options.every, options.queries)
    return LinesResult(
        **_setting(options, loaded),
        **{key: getattr(options, key) for key in ("every", "samples", "queries", "distractors")},
        line_tokens_least=least,
        line_tokens_most=most,
        answer_tokens=record.answer_tokens,
        rows=rows,
    )


def _run_questions(
    options: argparse.Namespace, loaded: LoadedModel, policies: list[Policy], questions: list[Question]
) -> QuestionsResult:
    asked = [in_tokens(loaded, question) for question in questions]
    _check_questions(loaded, policies, asked)
    rows: list[QuestionsRow] = []
    for policy in (None, *policies):
        label = f"{len(rows) + 1}/{len(policies) + 1} {policy.label if policy else 'one-shot'}"
        alone = rows[0].right if rows else None
        rows.append(measure_questions(loaded, policy or Dense(), asked, alone, label))
    return QuestionsResult(
        **_setting(options, loaded),
        texts=[Text(file=str(options.file), sha256=sha256_of(options.file))] if options.file else [],
        questions=len(asked),
        rows=rows,
    )


def _policies(options: argparse.Namespace, loaded: LoadedModel) -> list[Policy]:
    """The policies for all budgets; a policy without a budget is included once."""
    front = len(loaded.sink_ids)
    sinks = options.sinks if options.sinks is not None else [0, front or BORROWED]
    smallest = min(options.budgets)
    check(sinks, smallest, "--budgets")
    if "recompute" in (options.policies or ()) and smallest <= front:
        raise UserError(
            f"--budgets {smallest} leaves no window after the model's {front} sink tokens; make it at least {front + 1}"
        )
    policies = [p for budget in dict.fromkeys(options.budgets) for p in choose(options.policies, sinks, budget, front)]
    without_budget = [policy for policy in policies if policy.budget is None][:1]
    return without_budget + [policy for policy in policies if policy.budget is not None]


def _check_questions(loaded: LoadedModel, policies: list[Policy], questions: list[Asked]) -> None:
    """Raise UserError if a question does not fit into the model's positions; report those longer than a window."""
    lengths = [len(question.prompt) + max(map(len, question.choices)) for question in questions]
    longest = max(lengths)
    room = None if loaded.positions is None else loaded.positions - len(loaded.sink_ids)
    if room is not None and longest > room:
        raise UserError(
            f"question {lengths.index(longest) + 1} takes {longest} tokens with its longest choice, and {loaded.name} "
            f"has positions for {room}; shorten it or leave it out"
        )
    for policy in policies:
        if policy.window is not None and longest > policy.window:
            cut = sum(length > policy.window for length in lengths)
            say(
                f"{policy.label}: {cut} of {len(lengths)} questions are longer than the window and lose their beginning"
            )
    between = len(encode(loaded, BETWEEN))
    before = sum(len(question.prompt) + len(question.right) + between for question in questions[:-1])
    _check_stream(loaded, policies, len(loaded.sink_ids) + before + lengths[-1] - 1)


def _check_stream(loaded: LoadedModel, policies: list[Policy], places: int) -> None:
    for policy in policies:
        if policy.budget is None:
            refuse_narrower_window(loaded.model, policy.keys_seen(places))
    check_positions(loaded, places, policies, "--budgets", "fewer --queries stay within")
