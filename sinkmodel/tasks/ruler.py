"""RULER's tasks (arXiv 2404.06654, section 3 and appendix B), made by our own code after its definitions.

    niah_single_1 … 3      one needle in noise, or in the user's own text (numbers, uuids)
    niah_multikey_1        four needles in the user's own text, one of them asked for
    niah_multikey_2, 3     one needle among other needles (words to numbers, uuids to uuids)
    niah_multivalue        four values of one key        niah_multiquery     four keys, all asked for
    vt                     variable tracking: a chain of four hops, after a worked example
    cwe                    the ten most common words of a list, after a worked example
    fwe                    the three most frequent coded words, with frequencies after the zeta distribution (2.0)

Prompts, counts and the tokens that a model may generate are those of RULER's code (NVIDIA/RULER, in `scripts/`:
`synthetic.yaml` and `data/synthetic/`). These differ:

    - the essays of Paul Graham are the user's own text, each sample from another place in it
    - words are from a list of our own (`words`)
    - keys and values of one sample are all different
    - the worked example of vt grows with --length, and has its full size from 2,800 tokens on
    - no prompt ends with a space, which would change the first token of the answer
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Literal
from uuid import UUID

from sinkmodel.tasks.own_text import text_of
from sinkmodel.tasks.samples import Question, Sample, Setting, Task
from sinkmodel.tasks.words import PAIRS, WORDS, pair

Kind = Literal["words", "numbers", "uuids"]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = 40  # places in a text, evenly from its beginning to its end, at which a needle may be
HOPS = 4
COMMON = 10  # words to be found in cwe
SHORT = 4096  # cwe has smaller counts below this length
ZETA_2 = math.pi**2 / 6
CODED_LENGTH = 6  # letters of a coded word
TOKENS_A_CODED_WORD = 50  # of the prompt, for each word of the vocabulary


# ----------------------------------------------------------------------------------------------- needle in a haystack


@dataclass(frozen=True)
class Needles:
    """A variant of needle-in-a-haystack: `keys` with `values` each, of which `queries` keys are asked for."""

    haystack: Literal["noise", "text", "needles"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def build(self, rng: Random, units: int, setting: Setting) -> Sample:
        new_key, new_value = distinct(rng, self.key), distinct(rng, self.value)
        keys = _take(new_key, max(self.keys, self.queries))
        values = {key: _take(new_value, self.values) for key in keys}
        needles = [_needle(self.value, key, value) for key in keys for value in values[key]]
        rng.shuffle(needles)
        asked = rng.sample(keys, self.queries)
        answers = [value for key in asked for value in values[key]]
        depths = [rng.random() for _ in needles]
        grid = sorted(rng.sample(range(DEPTHS), len(needles)))
        others = [value for key in keys for value in values[key] if value not in answers]
        fresh = _take(new_value, setting.distractors * len(answers))
        lines, inside = self._haystack(rng, units, setting, new_key, new_value)
        others += rng.sample(inside, min(len(inside), len(fresh)))
        if self.haystack == "text":
            context = " ".join(_insert(lines, [int(units * depth / (DEPTHS - 1)) for depth in grid], needles))
        else:
            context = "\n".join(_insert(lines, sorted(int(depth * units) for depth in depths), needles))
        wrong = [*others, *fresh]
        distractors = [wrong[place : place + len(answers)] for place in range(0, len(wrong), len(answers))]
        question = self._question(asked, answers, [tuple(wrong) for wrong in distractors[: setting.distractors]])
        return Sample(self._before(len(answers) > 1), context, (question,))

    def _haystack(
        self, rng: Random, units: int, setting: Setting, new_key: Iterator[str], new_value: Iterator[str]
    ) -> tuple[list[str], list[str]]:
        """Its lines or sentences, and the values in it."""
        if self.haystack == "text":
            return text_of(setting).run(rng.random(), units), []
        if self.haystack == "noise":
            return [NOISE] * units, []
        pairs = [(next(new_key), next(new_value)) for _ in range(units)]
        return [_needle(self.value, key, value) for key, value in pairs], [value for _, value in pairs]

    def _before(self, many: bool) -> str:
        some, are, kind = ("Some", "are", self.value) if many else ("A", "is", self.value[:-1])
        return (
            f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. I will "
            f"quiz you about the {kind} afterwards.\n"
        )

    def _question(self, asked: Sequence[str], answers: Sequence[str], wrong: Sequence[Sequence[str]]) -> Question:
        are_all, are, kind = ("are all", "are", self.value) if len(answers) > 1 else ("is", "is", self.value[:-1])
        keys = _listed(asked)
        return Question(
            f"\nWhat {are_all} the special magic {kind} for {keys} mentioned in the provided text? The special magic "
            f"{kind} for {keys} mentioned in the provided text {are}",
            tuple(answers),
            _listed(answers),
            tuple(map(_listed, wrong)),
        )


def distinct(rng: Random, kind: Kind) -> Iterator[str]:
    """Words (an adjective and a noun), numbers of seven digits or uuids, without end and without one twice."""
    draw: dict[Kind, Callable[[], str]] = {
        "words": lambda: pair(rng.randrange(PAIRS)),
        "numbers": lambda: str(rng.randint(1_000_000, 9_999_999)),
        "uuids": lambda: str(UUID(int=rng.getrandbits(128), version=4)),
    }
    seen: set[str] = set()
    while True:
        if (value := draw[kind]()) not in seen:
            seen.add(value)
            yield value


def _take(values: Iterator[str], count: int) -> list[str]:
    return [next(values) for _ in range(count)]


def _needle(kind: Kind, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def _listed(words: Sequence[str]) -> str:
    """`a`, or `a, b, and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"


def _insert(lines: Sequence[str], places: Sequence[int], new: Sequence[str]) -> list[str]:
    """The lines with each of `new` in front of the line at its place; places are sorted."""
    merged = list(lines)
    for place, line in sorted(zip(places, new), reverse=True):
        merged.insert(place, line)
    return merged


# -------------------------------------------------------------------------------------------------- variable tracking


def track_variables(rng: Random, units: int, setting: Setting) -> Sample:
    def chain(letters: int) -> list[str]:
        return _take(coded(rng, string.ascii_uppercase, letters), HOPS + 1)

    def prompt(names: Sequence[str], value: str, noise: int, depths: Sequence[float]) -> tuple[str, str, str]:
        lines = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]
        places = sorted(int(depth * noise) for depth in depths)
        merged = [NOISE] * noise
        for before, (place, line) in enumerate(zip(places, lines)):  # in the order of the chain
            merged.insert(place + before, line)
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
            "\n".join(merged),
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According "
            f"to the chain(s) of variable assignment in the text above, {len(names)} variables are assigned the value "
            f"{value}, they are:",
        )

    example, names = chain(3), chain(5)
    values = [str(value) for value in rng.sample(range(10_000, 100_000), 2)]
    depths = [[rng.random() for _ in range(HOPS + 1)] for _ in values]
    worked = "".join(prompt(example, values[0], min(15, 1 + setting.length // 200), depths[0]))
    before, context, question = prompt(names, values[1], units, depths[1])
    others = [" ".join(chain(5)) for _ in range(setting.distractors)]
    return Sample(
        f"{worked} {' '.join(example)}\n\n{before}",
        context,
        (Question(question, tuple(names), " ".join(names), tuple(others)),),
    )


def coded(rng: Random, letters: str, length: int) -> Iterator[str]:
    """Random words of `length` letters, without one twice."""
    seen: set[str] = set()
    while True:
        if (word := "".join(rng.choices(letters, k=length))) not in seen:
            seen.add(word)
            yield word


# ---------------------------------------------------------------------------------------- common and frequent words


ASK_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n",
    "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often "
    "in the list are:",
)


def find_common_words(rng: Random, units: int, setting: Setting) -> Sample:
    """`units` different words, the first ten of them common."""
    ask, question = ASK_COMMON
    short = setting.length < SHORT
    example, of_example = _word_list(rng, *((20, 3, 1) if short else (40, 10, 3)))
    context, words = _word_list(rng, units, *((6, 1) if short else (30, 3)))
    common, uncommon = words[:COMMON], words[COMMON:]
    others = [_numbered(rng.sample(uncommon, COMMON)) for _ in range(setting.distractors)]
    return Sample(
        f"{ask}{example}{question} {_numbered(of_example[:COMMON])}\n{ask}",
        context,
        (Question(question, tuple(common), _numbered(common), tuple(others)),),
    )


def _word_list(rng: Random, count: int, common: int, uncommon: int) -> tuple[str, list[str]]:
    """A numbered list, shuffled, and its words: the first ten appear `common` times each, the others `uncommon`."""
    if count <= len(WORDS):
        words = rng.sample(WORDS, count)
    else:  # RULER has a second list for these
        words = [pair(number) for number in rng.sample(range(PAIRS), count)]
    every = words[:COMMON] * common + words[COMMON:] * uncommon
    rng.shuffle(every)
    return _numbered(every), words


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def find_frequent_words(rng: Random, units: int, setting: Setting) -> Sample:
    """Some `units` coded words; the most frequent one is noise, and the next three are asked for."""
    count = max(10, setting.length // TOKENS_A_CODED_WORD)
    vocabulary = ["...", *_take(coded(rng, string.ascii_lowercase, CODED_LENGTH), count - 1)]
    every = [word for k, word in enumerate(vocabulary, 1) for _ in range(int(units / k**2 / ZETA_2))]
    rng.shuffle(every)
    answers = vocabulary[1:4]
    others = [", ".join(rng.sample(vocabulary[4:], 3)) for _ in range(setting.distractors)]
    return Sample(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. ",
        " ".join(every),
        (
            Question(
                "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
                "frequently appeared words in the above coded text? Answer: According to the coded text above, the "
                "three most frequently appeared words are:",
                tuple(answers),
                ", ".join(answers),
                tuple(others),
            ),
        ),
    )


# --------------------------------------------------------------------------------------------------------------- tasks


def _sentences(setting: Setting) -> int:
    return len(text_of(setting).sentences)


NIAH = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("text"),
    "niah_single_3": Needles("text", value="uuids"),
    "niah_multikey_1": Needles("text", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key="uuids", value="uuids"),
    "niah_multivalue": Needles("text", values=4),
    "niah_multiquery": Needles("text", keys=4, queries=4),
}
TASKS = {
    task.name: task
    for task in (
        *(
            Task(name, 128, needles.build, most=_sentences, needs_text=True)
            if needles.haystack == "text"
            else Task(name, 128, needles.build)
            for name, needles in NIAH.items()
        ),
        Task("vt", 30, track_variables),
        Task("cwe", 120, find_common_words, least=2 * COMMON, most=lambda setting: PAIRS),
        # From 100 words on the third of the three is more frequent than the word after it.
        Task("fwe", 50, find_frequent_words, least=100),
    )
}
