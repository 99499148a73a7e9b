"""Which tokens of its prompts a NAMM forgets: by kind, by layer and KV head, and by age.

A token's kind is found with a few rules on the text, in this order. They are made for English prose and common code.

    blank            only white space
    comment          from # or // to the end of a line, or between /* and */; a Markdown heading looks the same
    number           digits
    function word    a word in a fixed list
    name             a word that begins with a capital in the middle of a sentence
    other word       every other word
    punctuation      everything else
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sinkmodel.memories import Memory
from sinkmodel.memories.selection import EMPTY
from sinkmodel.results.memories import AgeShare, Forgets, KindShare

KINDS = ("sink", "blank", "comment", "number", "function word", "name", "other word", "punctuation")
AGES = (0, 16, 64, 256, 1024, 4096, 16384, 65536)  # age is the number of later tokens; the start of each bin
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
a about after all an and any are as at be because been before being but by can could did do does for from had
has have he her hers him his how i if in into is it its may me might must my no nor not of on or our she should
so some than that the their them then there these they this those to under up upon us was we were what when
where which while who whom whose why will with would you your""",
    )
)
COMMENT = re.compile(r"(?:^|(?<=\s))(?:#|//).*$|/\*[\s\S]*?\*/", re.MULTILINE)
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
SENTENCE_START = re.compile(r"(?:^|[.!?][\s\"'”’)]*|[\n\"“‘(]\s*)$")


class Forgotten:
    """Accumulates statistics of the tokens that are kept of each prompt.

    Args:
        tokenizer: the model's tokenizer.
        sinks: number of the model's sink tokens in front of every prompt.
    """

    def __init__(self, tokenizer: Any, sinks: int):
        self.tokenizer, self.sinks = tokenizer, sinks
        self.heads: Tensor | int = 0  # [layers, KV heads]: sums over prompts of the kept share
        self.prompts = 0
        self.kinds = {kind: [0, 0.0] for kind in KINDS}  # tokens, and the sum of the shares of heads that keep them
        self.ages = {start: [0, 0.0] for start in AGES}

    def add(self, ids: Sequence[int], memory: Memory) -> None:
        """Count the tokens that a memory of one row holds at the end of a prompt."""
        kept_LGN = torch.stack([_kept(layer.held_positions()[0], len(ids)) for layer in memory.layers])
        self.heads, self.prompts = self.heads + kept_LGN.mean(dim=-1), self.prompts + 1
        of_tokens = kept_LGN.mean(dim=(0, 1)).tolist()
        kinds = ["sink"] * self.sinks + kinds_of(pieces_of(self.tokenizer, ids[self.sinks :]))
        for place, (kind, kept) in enumerate(zip(kinds, of_tokens)):
            age = len(ids) - 1 - place
            for counts in (self.kinds[kind], self.ages[max(start for start in AGES if start <= age)]):
                counts[0] += 1
                counts[1] += kept

    def table(self) -> Forgets:
        """The shares kept at the end of the prompts, as means over tokens, layers and heads."""
        heads = (self.heads / self.prompts).tolist() if isinstance(self.heads, Tensor) else []
        return Forgets(
            prompts=self.prompts,
            kinds=[KindShare(kind=kind, **_share(*counts)) for kind, counts in self.kinds.items() if counts[0]],
            ages=[AgeShare(start=start, **_share(*counts)) for start, counts in self.ages.items() if counts[0]],
            heads=heads,
        )


def _share(tokens: float, kept: float) -> dict[str, Any]:
    return {"tokens": int(tokens), "kept_share": kept / tokens}


def _kept(positions_GK: Tensor, tokens: int) -> Tensor:
    """[G, N] on the CPU: 1 for each token that a KV head holds, 0 for the others."""
    kept_GN = torch.zeros(len(positions_GK), tokens + 1)
    places = positions_GK.cpu().long()
    return kept_GN.scatter_(1, places.masked_fill(places == EMPTY, tokens), 1.0)[:, :tokens]


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the token before it; decoded alone, a token can lose its leading blank."""
    pieces = []
    for place, token in enumerate(ids):
        before = list(ids[place - 1 : place]) if place else []
        pieces.append(tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :])
    return pieces


def kinds_of(pieces: Sequence[str]) -> list[str]:
    """The kind of each token: that of its first character that is not blank."""
    text = "".join(pieces)
    of_letters = ["blank" if letter.isspace() else "punctuation" for letter in text]
    for found in re.finditer(r"\d+", text):
        of_letters[found.start() : found.end()] = ["number"] * len(found[0])
    for found in WORD.finditer(text):
        of_letters[found.start() : found.end()] = [_kind_of_word(text, found)] * len(found[0])
    for found in COMMENT.finditer(text):
        for place in range(*found.span()):
            if not text[place].isspace():
                of_letters[place] = "comment"
    kinds, start = [], 0
    for piece in pieces:
        end = start + len(piece)
        kinds.append(next((kind for kind in of_letters[start:end] if kind != "blank"), "blank"))
        start = end
    return kinds


def _kind_of_word(text: str, word: re.Match[str]) -> str:
    if word[0].lower() in FUNCTION_WORDS:
        return "function word"
    begins = SENTENCE_START.search(text[max(0, word.start() - 8) : word.start()]) if word.start() else True
    return "other word" if begins or not word[0][0].isupper() else "name"
