"""StreamEval's record: lines without end, and queries about what stood a fixed number of lines ago.

The text is that of Figure 8 of the paper (arXiv 2309.17453, section 4.3 and appendix C), whose data was never released:

    Below is a record of lines I want you to remember.
    The REGISTER_CONTENT in line 0 is <28806>
    …
    The REGISTER_CONTENT in line 20 is <45603>
    Query: The REGISTER_CONTENT in line 0 is <28806>
    The REGISTER_CONTENT in line 21 is <29189>

A query stands behind every `every`-th line and asks for the line `distance` before it; no line is asked for twice.
What stays in the stream behind a query is the true answer, whatever the model would have said. The paper does not tell
what stays there.

Ours alone: contents have five digits and as many tokens as most numbers have, so that streams of one distance are
equally long and answers can be compared; a query goes up to the "<", where the figure's goes up to "is", so that only
the number is asked for; the answer includes its ">", so that a longer number is none.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sinkmodel.errors import UserError

if TYPE_CHECKING:
    from sinkmodel.loading import LoadedModel

HEADER = "Below is a record of lines I want you to remember.\n"
NUMBERS = range(10_000, 100_000, 7)  # contents are drawn from these: more than a sample needs, quickly tokenized


@dataclass(frozen=True)
class Query:
    """One query of a stream. Places count tokens from the start of the stream, sinks included, from 0."""

    fed: list[int]  # all that comes since the last query, whose true answer stands first, up to the token before `<…>`
    candidates: list[list[int]]  # the right answer, then distractors; all of one length
    line: int  # place of the first token of the line that is asked for
    end: int  # place behind its last
    place: int  # place of the last token fed, which predicts the first of the answer

    @property
    def back(self) -> int:
        """The latest tokens that must be kept for the line to be whole while the last of the answer is predicted."""
        return self.place + len(self.candidates[0]) - self.line


@dataclass(frozen=True)
class Content:
    """What stands behind `is <`, in tokens."""

    answer: list[int]  # the digits and `>`
    after: list[int]  # the line's end, where it is a token of its own


class Record:
    """Samples of the task in the tokens of one model; UserError where its tokenizer cannot write them."""

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
        """The fewest and the most tokens that a line takes: its number grows."""
        last = last_line(distance, every, queries)
        self._number_lines(last + 1)
        tail = len(self.contents[0].answer) + len(self.contents[0].after)
        counts = [len(head) + tail for head in self.heads[: last + 1]]
        return min(counts), max(counts)

    def sample(self, seed: int, number: int, distance: int, every: int, queries: int, distractors: int) -> list[Query]:
        """The queries of stream `number`, the same for every policy and budget.

        Distractors are contents of other lines among the latest 2 × `distance`, so that to have seen a number is not
        enough; where these are too few, numbers that the stream does not have.
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
    """The number of the line behind which the last query stands: the first has `distance` lines before it."""
    return (-(-distance // every) + queries - 1) * every


def _head(number: int) -> str:
    return f"The REGISTER_CONTENT in line {number} is <"


def _contents(loaded: LoadedModel) -> list[Content]:
    """All numbers that take as many tokens as most of them."""
    head = _head(0)
    head_ids, bare, *lines = _encode(loaded, [head, f"{head}10000>", *(f"{head}{number}>\n" for number in NUMBERS)])
    # Where the tokenizer joins > and the line's end, both belong to the answer.
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
