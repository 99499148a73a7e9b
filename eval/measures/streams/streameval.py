"""`sink-eval streameval`: does a stream remember what it read some time ago, and does it still answer questions well?

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
from typing import TYPE_CHECKING, Any

from eval.measures.command import (
    MODEL_HELP,
    add_common_arguments,
    check_output,
    give_result,
    keys_seen,
    load,
    new_table,
    number,
    show,
    span,
)
from eval.measures.texts import check_positions
from eval.policies.choice import BORROWED, NAMES, check, choose
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.parser import name_of, path_of, positive, whole

if TYPE_CHECKING:
    from eval.measures.streams.questions import Asked, Question
    from eval.policies.policy import Policy
    from sinkmodel.loading import LoadedModel

DESCRIPTION = "What a stream remembers: StreamEval's lines by distance, and questions answered one after the other."
EXAMPLE = "sink-eval streameval --model runs/sink --budgets 256 512 --distances 5 10 20 --samples 10 --queries 20"
# The paper's values, except `distractors` (they only rank an answer) and `rows` (it only changes the speed).
LINES = {"distances": [20], "every": 10, "samples": 100, "queries": 100, "distractors": 9, "rows": 8}
MADE = 1000  # made-up questions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=name_of, required=True, metavar="NAME", help=MODEL_HELP)
    parser.add_argument("--task", choices=("lines", "questions"), default="lines", help="default: lines, StreamEval")
    parser.add_argument(
        "--budgets",
        type=positive,
        nargs="+",
        default=[1024],
        metavar="C",
        help="keys a query sees, including its own and the sinks (default: 1024)",
    )
    parser.add_argument(
        "--sinks",
        type=whole,
        nargs="+",
        metavar="S",
        help="first keys that are never evicted (default: 0 and the number of the model's own sinks, or "
        f"{BORROWED} if it has none)",
    )
    parser.add_argument("--policies", nargs="+", choices=NAMES, help="default: window (if --sinks has a 0) and sink")
    lines = parser.add_argument_group("lines")
    lines.add_argument(
        "--distances",
        type=positive,
        nargs="+",
        metavar="D",
        help="lines from the one asked for to the latest (default: 20)",
    )
    lines.add_argument("--every", type=positive, metavar="N", help="lines from a query to the next (default: 10)")
    lines.add_argument("--samples", type=positive, metavar="N", help="streams (default: 100)")
    lines.add_argument(
        "--distractors",
        type=positive,
        metavar="N",
        help="other numbers that the answer is ranked against (default: 9)",
    )
    lines.add_argument(
        "--rows", type=positive, metavar="N", help="streams computed together; changes only the speed (default: 8)"
    )
    questions = parser.add_argument_group("questions")
    questions.add_argument(
        "--file",
        type=path_of,
        metavar="FILE.jsonl",
        help="questions with choices and answer (a number from 0, or the text), or ARC's own rows (default: made up)",
    )
    parser.add_argument(
        "--queries",
        type=positive,
        metavar="N",
        help=f"queries of each stream (default: lines 100; questions all of the file, or {MADE} made up)",
    )
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="random seed of the samples (default: 0)")
    add_common_arguments(parser)


def run(options: argparse.Namespace) -> None:
    from eval.measures.streams.questions import make_questions, read_questions

    check(options.sinks or [0], min(options.budgets), "--budgets")
    _settle_task(options)
    check_output("--json", options.json)
    asked = read_questions(options.file, options.queries) if options.file else []
    loaded = load(options)
    policies = _policies(options, loaded)
    if options.task == "lines":
        content = _run_lines(options, loaded, policies)
    else:
        asked = asked or make_questions(options.seed, options.queries or MADE)
        content = _run_questions(options, loaded, policies, asked)
    head = {"command": "streameval", "model": options.model, "sink_ids": loaded.sink_ids, "task": options.task}
    setting = {"seed": options.seed, "dtype": options.dtype, "device": str(loaded.model.device)}
    show_table = print_lines if options.task == "lines" else print_questions
    give_result(options, {**head, **setting, **content}, lambda: show_table(options, content))


def _run_lines(options: argparse.Namespace, loaded: LoadedModel, policies: list[Policy]) -> dict[str, Any]:
    from eval.measures.streams.answers import measure_lines
    from eval.measures.streams.lines import Record

    record = Record(loaded)
    samples = {
        distance: [
            record.sample(options.seed, n, distance, options.every, options.queries, options.distractors)
            for n in range(options.samples)
        ]
        for distance in dict.fromkeys(options.distances)
    }
    _check_stream(loaded, policies, max(streams[0][-1].place for streams in samples.values()) + record.answer_tokens)
    rows: list[dict[str, Any]] = []
    for policy in policies:
        for distance, streams in samples.items():
            label = f"{len(rows) + 1}/{len(policies) * len(samples)} {policy.label}, {distance} lines back"
            row = measure_lines(loaded.model, policy, streams, options.rows, label)
            rows.append({**row, "distance": distance})
    least, most = record.line_tokens(max(samples), options.every, options.queries)
    content = {
        **{key: getattr(options, key) for key in ("every", "samples", "queries", "distractors")},
        "line_tokens_least": least,
        "line_tokens_most": most,
        "answer_tokens": record.answer_tokens,
        "rows": rows,
    }
    return content


def _run_questions(
    options: argparse.Namespace, loaded: LoadedModel, policies: list[Policy], questions: list[Question]
) -> dict[str, Any]:
    from eval.measures.streams.answers import measure_questions
    from eval.measures.streams.questions import in_tokens
    from eval.policies.dense import Dense
    from sinkmodel.files import sha256_of

    asked = [in_tokens(loaded, question) for question in questions]
    _check_questions(loaded, policies, asked)
    rows: list[dict[str, Any]] = []
    for policy in (None, *policies):
        label = f"{len(rows) + 1}/{len(policies) + 1} {policy.label if policy else 'one-shot'}"
        alone = rows[0]["right"] if rows else None
        rows.append(measure_questions(loaded, policy or Dense(), asked, alone, label))
    content = {
        "texts": [{"file": str(options.file), "sha256": sha256_of(options.file)}] if options.file else [],
        "questions": len(asked),
        "rows": rows,
    }
    return content


# ---------------------------------------------------------------------------------------------------- what is checked


def _settle_task(options: argparse.Namespace) -> None:
    """Fill in the defaults of the chosen task. Raises UserError for an option of the other task."""
    if options.task == "lines":
        if options.file is not None:
            raise UserError("--file is only for questions; add --task questions")
        for name, value in LINES.items():
            if getattr(options, name) is None:
                setattr(options, name, value)
        return
    for name in LINES.keys() - {"queries"}:
        if getattr(options, name) is not None:
            raise UserError(f"--{name} is only for --task lines; leave it out")


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
    from eval.measures.streams.questions import BETWEEN
    from sinkmodel.loading import encode

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
    from eval.policies.policy import refuse_narrower_window

    for policy in policies:
        if policy.budget is None:
            refuse_narrower_window(loaded.model, policy.keys_seen(places))
    check_positions(loaded, places, policies, "--budgets", "fewer --queries stay within")


# ------------------------------------------------------------------------------------------------------ what is shown


def print_lines(options: argparse.Namespace, content: dict[str, Any]) -> None:
    tokens = span(content["line_tokens_least"], content["line_tokens_most"])
    table = new_table(
        f"{options.model}, {options.dtype}: {content['samples']} samples × {content['queries']} queries, one every "
        f"{content['every']} lines of {tokens} tokens",
        "back: from the line asked for to the end of the answer; kept: share of queries whose line stays whole in the "
        f"cache until then; accuracy: greedy decoding gives the answer of {content['answer_tokens']} tokens; nats: of "
        f"the answer; rank: of the answer among itself and {content['distractors']} other numbers of the stream, by "
        f"chance {content['distractors'] / 2 + 1:g}; "
        "±: standard error over samples",
        ["policy"],
        ["keys seen", "lines back", "tokens back", "kept", "accuracy", "±", "nats", "±", "rank", "±", "tokens/s"],
    )
    for row in content["rows"]:
        table.add_row(
            row["label"],
            keys_seen(row),
            str(row["distance"]),
            span(row["tokens_back_least"], row["tokens_back_most"]),
            f"{row['kept']:.0%}",
            *(number(row[key], ".4f") for key in ("accuracy", "accuracy_stderr")),
            *(number(row[key], ".3f") for key in ("nll", "nll_stderr", "rank", "rank_stderr")),
            f"{row['tokens_per_second']:,.0f}",
        )
    show(table)


def print_questions(options: argparse.Namespace, content: dict[str, Any]) -> None:
    table = new_table(
        f"{options.model}, {options.dtype}: {content['questions']} questions, {options.file or 'made up'}",
        "one-shot: each question in an empty cache; the others: one after the other in one stream, each followed by "
        "its right answer; accuracy: of the choice with the highest log-likelihood per character; − one-shot: paired "
        "by question; nats: of the right choice; ±: standard error over questions",
        ["policy"],
        ["keys seen", "tokens", "accuracy", "±", "− one-shot", "±", "nats", "±", "tokens/s"],
    )
    for row in content["rows"]:
        table.add_row(
            row["label"],
            keys_seen(row),
            f"{row['tokens']:,}",
            *(number(row[key], ".4f") for key in ("accuracy", "accuracy_stderr")),
            number(row["difference"], "+.4f"),
            number(row["difference_stderr"], ".4f"),
            *(number(row[key], ".3f") for key in ("nll", "nll_stderr")),
            f"{row['tokens_per_second']:,.0f}",
        )
    show(table)
