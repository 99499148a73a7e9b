"""Write training text for a small model that can recall: prose, and tasks of `sink-eval longcontext` with answers.

    python examples/recall_text.py --text books.jsonl.xz --stage full --documents 150000 --output full.jsonl
    python examples/recall_text.py --text books.jsonl.xz --stage copies --documents 60000 --output copies.jsonl
    python examples/recall_text.py --text books.jsonl.xz --stage short --documents 120000 --output short.jsonl
    python examples/recall_text.py --text books.jsonl.xz --stage answers --documents 80000 --output answers.jsonl

A document is consecutive sentences of the books, random words of them repeated two or three times (`copy`), or a sample
of a task with the answers to all its questions. From copies of few words, a small model learns within minutes to look
back. It keeps this skill if the next texts are mixed with the old ones, and loses it if they replace them at once.
RESULTS.md has the commands of all stages, and what was measured after each ("A small model that recalls"). Use other
books for `sink-eval longcontext`, so that the model has not read them.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from sinkmodel.console import command, put
from sinkmodel.errors import UserError
from sinkmodel.files import atomic_file
from sinkmodel.parser import OneLineParser, path_of, positive, whole
from sinkmodel.progress import CountedProgress
from sinkmodel.tasks import own_text, ruler
from sinkmodel.tasks.samples import Sample, Setting
from sinkmodel.tasks.text import WORD, OwnText, read_own_text

EXAMPLE = "python examples/recall_text.py --text books.jsonl.xz --stage full --documents 150000 --output full.jsonl"


@dataclass(frozen=True)
class Share:
    """A kind of document: its weight, and the least and most sentences, words, pairs or needles in it."""

    task: str
    weight: int
    least: int
    most: int


@dataclass(frozen=True)
class Stage:
    """The text of one stage of training.

    Attributes:
        mixture: the kinds of documents.
        words: number of the books' most frequent words from which copies are made.
        copies: how often a line of words occurs in a copy.
        questions: largest number of questions about the context of a task.
    """

    mixture: tuple[Share, ...]
    words: int
    copies: int
    questions: int = 4


PROSE, COPY = "prose", "copy"
STAGES = {
    "copies": Stage((Share(COPY, 1, 5, 25),), words=300, copies=2),
    "short": Stage(
        (
            Share(PROSE, 10, 2, 5),
            Share(COPY, 40, 5, 30),
            Share("verbatim", 20, 1, 2),
            Share("key_value", 20, 4, 8),
            Share("niah_single_1", 2, 1, 2),
            Share("niah_single_2", 3, 2, 3),
            Share("niah_multikey_1", 3, 4, 4),
            Share("niah_multikey_2", 3, 2, 3),
        ),
        words=1500,
        copies=3,
    ),
    "full": Stage(
        (
            Share(PROSE, 15, 4, 30),
            Share(COPY, 35, 10, 100),
            Share("verbatim", 15, 1, 8),
            Share("key_value", 20, 4, 40),
            Share("niah_single_1", 3, 1, 20),
            Share("niah_single_2", 3, 2, 20),
            Share("niah_multikey_1", 3, 4, 20),
            Share("niah_multikey_2", 3, 2, 20),
            Share("niah_multiquery", 3, 4, 20),
        ),
        words=300,
        copies=3,
    ),
    "answers": Stage(
        (
            Share(PROSE, 10, 4, 30),
            Share(COPY, 10, 10, 60),
            Share("verbatim", 15, 1, 6),
            Share("key_value", 35, 4, 50),
            Share("niah_single_1", 10, 1, 20),
            Share("niah_single_2", 10, 2, 12),
            Share("niah_multikey_1", 10, 4, 12),
        ),
        words=1500,
        copies=2,
        questions=10,
    ),
}


@command("recall_text")
def main(argv: list[str]) -> int | None:
    options = parse(argv)
    stage = STAGES[options.stage]
    text = read_books(options.text, stage)
    words = frequent_words(text, options.words or stage.words)
    with (
        atomic_file(options.output) as path,
        path.open("w", encoding="utf-8") as file,
        CountedProgress("writing", "documents", options.documents) as progress,
    ):
        for number in range(options.documents):
            document = make_document(Random(f"{options.seed} {number}"), stage, text, words)
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            progress.add(1)
    put(f"wrote {options.documents:,} documents to {options.output}")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("recall_text.py", "Write training text with recall tasks.", f"Example:\n  {EXAMPLE}")
    parser.add_argument(
        "--text", nargs="+", type=path_of, required=True, metavar="FILE", help="books, as for sink-prepare"
    )
    parser.add_argument("--stage", choices=STAGES, default="full", help="stage of the training (default: full)")
    parser.add_argument("--documents", type=positive, default=100_000, metavar="N")
    parser.add_argument(
        "--words",
        type=positive,
        metavar="N",
        help="make copies from the N most frequent words of the books (default: as the stage has it)",
    )
    parser.add_argument("--seed", type=whole, default=0, metavar="N")
    parser.add_argument("--output", type=path_of, required=True, metavar="FILE.jsonl")
    return parser.parse_args(argv)


def read_books(files: list[Path], stage: Stage) -> OwnText:
    """Read the books. Raises UserError if they are too short for the longest document of any kind."""
    text, _ = read_own_text(files)
    for share in stage.mixture:
        has = {"verbatim": text.passages, "key_value": text.words[::2]}.get(share.task, text.sentences)
        if len(has) < share.most:
            raise UserError(f"--text is too short for {share.task}, which needs {share.most} parts of it; add books")
    return text


def frequent_words(text: OwnText, count: int) -> list[str]:
    return [word for word, _ in Counter(WORD.findall(" ".join(text.sentences).lower())).most_common(count)]


def make_document(rng: Random, stage: Stage, text: OwnText, words: Sequence[str]) -> str:
    """A random document of the stage. Copies are made from `words`."""
    share = rng.choices(stage.mixture, [share.weight for share in stage.mixture])[0]
    units = round(share.least * (share.most / share.least) ** rng.random())  # log-uniform
    if share.task == PROSE:
        return " ".join(text.run(rng.random(), units))
    if share.task == COPY:
        return "\n".join([" ".join(rng.choices(words, k=units))] * stage.copies)
    task = (own_text.TASKS | ruler.TASKS)[share.task]
    return answered(task.build(rng, units, Setting(0, distractors=0, text=text, questions=stage.questions)))


def answered(sample: Sample) -> str:
    """The sample as one text, with each question followed by its answer."""
    return sample.before + sample.context + "".join(f"{q.text} {q.reference}" for q in sample.questions)


if __name__ == "__main__":
    raise SystemExit(main())
