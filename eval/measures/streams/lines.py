"""StreamEval's record: an endless list of lines, with queries about the line a fixed number of lines before.

The text is that of Figure 8 of the paper (arXiv 2309.17453, section 4.3 and appendix C), whose data was never released:

    Below is a record of lines I want you to remember.
    The REGISTER_CONTENT in line 0 is <28806>
    …
    The REGISTER_CONTENT in line 20 is <45603>
    Query: The REGISTER_CONTENT in line 0 is <28806>
    The REGISTER_CONTENT in line 21 is <29189>

A query follows every `every`-th line and asks for the line `distance` before it; no line is asked for twice. After a
query the stream always continues with the true answer, whatever the model would have answered. The paper does not
describe how its stream continues.

Three things differ from the paper. Contents are five-digit numbers with the most common token count, so that streams of
one distance are equally long and answers can be compared. A query ends with "<", while the figure's ends with "is", so
that only the number is asked for. The answer includes its ">", so that a longer number does not count as right.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from sinkmodel.errors import UserError
from sinkmodel.loading import LoadedModel

HEADER = "Below is a record of lines I want you to remember.\n"
NUMBERS = range(10_000, 100_000, 7)  # contents are drawn from these: enough for a sample, and quick to tokenize


@dataclass(frozen=True)
class Query:
    """One query of a stream. A place is a token's position in the stream, counted from 0, sinks included."""

    fed: list[int]  # what follows the previous query's `<`: its true answer, then lines, up to this query's `<`
    candidates: list[list[int]]  # the right answer, then distractors; all have the same length
    line: int  # place of the first token of the line that is asked for
    end: int  # place after the last token of that line
    place: int  # place of the last token fed, which predicts the first token of the answer

    @property
    def back(self) -> int:
        """How many latest tokens must be cached so that the line is whole when the answer's last token is predicted."""
        return self.place + len(self.candidates[0]) - self.line


@dataclass(frozen=True)
class Content:
    """The tokens of a line after `is <`."""

    answer: list[int]  # the digits and `>`
    after: list[int]  # the line break, if it is a token of its own; else empty


class Record:
    """Samples of the task in one model's tokens. Raises UserError if the tokenizer joins `<` with a number."""

    def __init__(self, loaded: LoadedModel):
        self.front = loaded.sink_ids + _encode(loaded, [HEADER])[0]
        self.loaded = loaded
        self.contents = _contents(loaded)
        self.heads: list[list[int]] = []  # of line 0, 1, …: up to the `<`
        self.asks: list[list[int]] = []

    @property
    def answer_tokens(self) -> int:
        return len(self.contents[0].answer)

    def line_tokens(self, distance: int, every: int, queries: int) -> tuple[int, int]:
        """The fewest and the most tokens of a line; a line gets longer as its number grows."""
        last = last_line(distance, every, queries)
        self._number_lines(last + 1)
        tail = len(self.contents[0].answer) + len(self.contents[0].after)
        counts = [len(head) + tail for head in self.heads[: last + 1]]
        return min(counts), max(counts)

    def sample(self, seed: int, number: int, distance: int, every: int, queries: int, distractors: int) -> list[Query]:
        """The queries of stream `number`, the same for every policy and budget.

        Distractors are contents of other lines among the latest 2 × `distance`, so that recognising a number that was
        in the stream is not enough. If these are too few, the rest are numbers that the stream does not contain.
        """
        rng = random.Random(f"{seed} {number}")
        count = last_line(distance, every, queries) + 1
        if count + distractors > len(self.contents):
            raise UserError(
                f"a stream of {count} lines and {distractors} distractors needs more numbers than the "
                f"{len(self.contents)} that there are of one length; lower --queries, --every, --distances or "
                "--distractors"
            )
        self._number_lines(count)
        drawn = rng.sample(self.contents, count + distractors)
        lines, unseen = drawn[:count], drawn[count:]
        fed, done, starts, result = list(self.front), 0, [], []
        for n, content in enumerate(lines):
            starts.append(done + len(fed))
            fed += self.heads[n] + content.answer + content.after
            if n % every or n < distance:
                continue
            asked = n - distance
            fed += self.asks[asked]
            near = [lines[i] for i in range(max(0, n - 2 * distance), n + 1) if i != asked]
            wrong = rng.sample(near, min(len(near), distractors))
            wrong += unseen[: distractors - len(wrong)]
            candidates = [content.answer for content in (lines[asked], *wrong)]
            end = starts[asked] + len(self.heads[asked]) + len(lines[asked].answer) + len(lines[asked].after)
            result.append(Query(fed, candidates, starts[asked], end, done + len(fed) - 1))
            done += len(fed)
            fed = lines[asked].answer + lines[asked].after
        assert len(result) == queries
        return result

    def _number_lines(self, count: int) -> None:
        numbers = range(len(self.heads), count)
        if numbers:
            self.heads += _encode(self.loaded, [_head(n) for n in numbers])
            self.asks += _encode(self.loaded, ["Query: " + _head(n) for n in numbers])


def last_line(distance: int, every: int, queries: int) -> int:
    """The number of the line that the last query follows; the first query has at least `distance` lines before it."""
    return (-(-distance // every) + queries - 1) * every


def _head(number: int) -> str:
    return f"The REGISTER_CONTENT in line {number} is <"


def _contents(loaded: LoadedModel) -> list[Content]:
    """All numbers with the most common token count."""
    head = _head(0)
    head_ids, bare, *lines = _encode(loaded, [head, f"{head}10000>", *(f"{head}{number}>\n" for number in NUMBERS)])
    # If the tokenizer joins ">" and the line break into one token, that token belongs to the answer.
    end = len(lines[0]) - len(bare) if lines[0][: len(bare)] == bare else 0
    contents = [
        Content(line[len(head_ids) : len(line) - end], line[len(line) - end :])
        for line in lines
        if line[: len(head_ids)] == head_ids
    ]
    if not contents:
        raise UserError(f"the tokenizer of {loaded.name} joins '<' and a number; StreamEval's lines need them apart")
    ((usual, _),) = Counter(len(content.answer) for content in contents).most_common(1)
    return [content for content in contents if len(content.answer) == usual]


def _encode(loaded: LoadedModel, texts: list[str]) -> list[list[int]]:
    """Token ids of many short texts at once, without sinks."""
    return loaded.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
