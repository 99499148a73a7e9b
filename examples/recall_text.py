"""Text for a small model that can recall: prose, and tasks of `sink-eval longcontext` with their answers.

    python examples/recall_text.py --text books.jsonl.xz --documents 100000 --output recall.jsonl
    sink-prepare --input recall.jsonl --vocabulary_size 2048 --output data/recall
    sink-pretrain --config recall --config sink-token --data.path data/recall --output runs/recall

Each document is a run of sentences of the books, random words of them three times over (`copy`), or a sample of a task
with the answers to all its questions. Give other books to `sink-eval longcontext`, so that the model has not read them.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
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

EXAMPLE = "python examples/recall_text.py --text books.jsonl.xz --documents 100000 --output recall.jsonl"


@dataclass(frozen=True)
class Share:
    """A kind of document: how often it is drawn, and the fewest and most sentences, words, pairs or needles in it."""

    task: str
    weight: int
    least: int
    most: int


@dataclass(frozen=True)
class Books:
    """Sentences, and the words that copies are made of: the most frequent ones, each a token, so that a copy of them is
    the easiest thing to learn that needs a look back."""

    text: OwnText
    common: list[str]


PROSE, COPY = "prose", "copy"
MIXTURE = (
    Share(PROSE, 15, 4, 30),
    Share(COPY, 35, 10, 100),
    Share("verbatim", 15, 1, 8),
    Share("key_value", 20, 4, 40),
    Share("niah_single_1", 3, 1, 20),
    Share("niah_single_2", 3, 2, 20),
    Share("niah_multikey_1", 3, 4, 20),
    Share("niah_multikey_2", 3, 2, 20),
    Share("niah_multiquery", 3, 4, 20),
)
COPIES = 3
COMMON = 300  # words that copies are made of


@command("recall_text")
def main(argv: list[str]) -> int | None:
    options = parse(argv)
    books = read_books(options.text)
    with (
        atomic_file(options.output) as path,
        path.open("w", encoding="utf-8") as file,
        CountedProgress("writing", "documents", options.documents) as progress,
    ):
        for number in range(options.documents):
            document = make_document(Random(f"{options.seed} {number}"), books)
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            progress.add(1)
    put(f"{options.documents:,} documents are in {options.output}")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("recall_text.py", "Write text with a share of recall tasks.", f"Example:\n  {EXAMPLE}")
    parser.add_argument(
        "--text", nargs="+", type=path_of, required=True, metavar="FILE", help="books, as for sink-prepare"
    )
    parser.add_argument("--documents", type=positive, default=100_000, metavar="N")
    parser.add_argument("--seed", type=whole, default=0, metavar="N")
    parser.add_argument("--output", type=path_of, required=True, metavar="FILE.jsonl")
    return parser.parse_args(argv)


def read_books(files: list[Path]) -> Books:
    """Raises UserError if the books are too short for the longest document of each kind."""
    text, _ = read_own_text(files)
    for share in MIXTURE:
        has = {"verbatim": text.passages, "key_value": text.words[::2]}.get(share.task, text.sentences)
        if len(has) < share.most:
            raise UserError(f"--text is too short for {share.task}, which takes {share.most} parts of it; add books")
    counts = Counter(WORD.findall(" ".join(text.sentences).lower()))
    return Books(text, [word for word, _ in counts.most_common(COMMON)])


def make_document(rng: Random, books: Books) -> str:
    share = rng.choices(MIXTURE, [share.weight for share in MIXTURE])[0]
    units = round(share.least * (share.most / share.least) ** rng.random())  # short ones as often as long ones
    if share.task == PROSE:
        return " ".join(books.text.run(rng.random(), units))
    if share.task == COPY:
        return "\n".join([" ".join(rng.choices(books.common, k=units))] * COPIES)
    task = (own_text.TASKS | ruler.TASKS)[share.task]
    return answered(task.build(rng, units, Setting(length=0, distractors=0, text=books.text)))


def answered(sample: Sample) -> str:
    """The sample as one text, each question with its answer."""
    return sample.before + sample.context + "".join(f"{q.text} {q.reference}" for q in sample.questions)


if __name__ == "__main__":
    raise SystemExit(main())
