"""Local .jsonl files as tasks: one JSON object per line, whose keys determine the kind of question.

    question, choices, answer    multiple choice: `choices` has two or more texts, `answer` is the index of the right
                                 one (from 0) or its text; a blank is put between question and choice
    context, continuation        would the model generate the continuation greedily, as in LAMBADA? No blank is added
                                 after the context, so the continuation must begin with its own
    text                         log-likelihood of the whole text, over as many windows as necessary

Other keys are ignored. The first row determines the kind of the file. Every row is checked before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

from datasets import Dataset

from sinkmodel.errors import UserError
from sinkmodel.text.json_lines import Row


def task_config(path: Path, rows: list[Row]) -> dict[str, Any]:
    """lm-eval's config of the task with these rows. Raises UserError that names the first invalid row."""
    for keys, parse, config in FORMS:
        if not rows[0].keys() >= set(keys):
            continue
        parsed = []
        for number, row in enumerate(rows, 1):
            try:
                parsed.append(parse(row))
            except ValueError as error:
                raise UserError(f"{path}, row {number}: {error}; correct it or remove it") from None
        return {**config(), **in_memory(parsed)}
    raise UserError(
        f"{path}: a row has the keys {', '.join(rows[0]) or '(none)'}; it needs question, choices and answer, or "
        "context and continuation, or text"
    )


def in_memory(rows: list[Row]) -> dict[str, Any]:
    """The part of a task's config that makes these rows its questions, without a copy on disk."""

    def dataset(**_: Any) -> dict[str, Any]:
        return {"test": Dataset.from_list(rows)}

    return {"custom_dataset": dataset, "test_split": "test"}


# ----------------------------------------------------------------------------------------------------- the three forms


def _question(row: Row) -> Row:
    choices, answer = row.get("choices"), row.get("answer")
    if not _is_text(row.get("question")):
        raise ValueError("'question' is not a text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise ValueError("'choices' is not a list of two or more texts")
    if isinstance(answer, str) and choices.count(answer) == 1:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"'answer' is neither one of the choices nor an index from 0 to {len(choices) - 1}")
    return {"question": row["question"], "choices": choices, "answer": answer}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(*keys: str) -> Callable[[Row], Row]:
    def parse(row: Row) -> Row:
        for key in keys:
            if not _is_text(row.get(key)):
                raise ValueError(f"'{key}' is not a text")
        return {key: row[key] for key in keys}

    return parse


def _multiple_choice() -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": itemgetter("question"),
        "doc_to_choice": itemgetter("choices"),
        "doc_to_target": itemgetter("answer"),
        "metric_list": [_metric("acc", "mean", True), _metric("acc_norm", "mean", True)],
    }


def _continuation() -> dict[str, Any]:
    return {
        "output_type": "loglikelihood",
        "doc_to_text": itemgetter("context"),
        "doc_to_target": itemgetter("continuation"),
        "metric_list": [_metric("acc", "mean", True), _metric("perplexity", "perplexity", False)],
    }


def _rolling() -> dict[str, Any]:
    # No word_perplexity: a text without blanks would be one word, and its perplexity would overflow.
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": itemgetter("text"),
        "metric_list": [
            _metric("bits_per_byte", "bits_per_byte", False),
            _metric("byte_perplexity", "weighted_perplexity", False),
        ],
    }


def _metric(name: str, aggregation: str, higher_is_better: bool) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}


FORMS: tuple[tuple[tuple[str, ...], Callable[[Row], Row], Callable[[], dict[str, Any]]], ...] = (
    (("question", "choices", "answer"), _question, _multiple_choice),
    (("context", "continuation"), _texts("context", "continuation"), _continuation),
    (("text",), _texts("text"), _rolling),
)
