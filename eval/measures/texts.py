"""The texts that a measure reads, as token ids, and checks that a model can read them."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from pathlib import Path

from eval.policies.policy import Policy, end_of
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.files import sha256_of
from sinkmodel.loading import LoadedModel, encode
from sinkmodel.results.parts import Text
from sinkmodel.sinks import sink_ids_of
from sinkmodel.text import read_documents
from sinkmodel.unused_rows import UNUSED


def read_texts(
    loaded: LoadedModel,
    files: list[Path],
    budget: int,
    tokens: int | None,
    count: int | None,
    option: str = "--budget",
) -> tuple[list[Text], list[Sequence[int]]]:
    """Read the documents of all files and encode them.

    Returns, for each file, a summary of what was used of it; and the token ids of all documents, after the sinks. A
    document that does not fill the budget cannot distinguish policies: it is left out and reported. A document shorter
    than `tokens` is used whole, which is reported too. Raises UserError if no document of a file fills the budget.

    Args:
        budget: fewest text tokens of a document that is used.
        tokens: most text tokens of a document that are used; None: all.
        count: most documents of each file; None: all.
        option: the option that set `budget`, for messages.
    """
    texts: list[Text] = []
    documents: list[Sequence[int]] = []
    for file in files:
        taken = kept = too_short = cut = longest = 0
        for text in read_documents(file):
            ids = encode(loaded, text, tokens)
            longest = max(longest, len(ids))
            if len(ids) < budget:
                too_short += 1
                continue
            cut += tokens is not None and len(ids) < tokens
            documents.append(array("i", [*loaded.sink_ids, *ids]))
            taken, kept = taken + 1, kept + len(ids)
            if taken == count:
                break
        if not taken and longest == 0:
            raise UserError(f"{file} has no text in it; give a file with at least {budget} tokens in a document")
        if not taken:
            raise UserError(
                f"{file} is shorter than the budget: its longest document has {longest} tokens, {option} is {budget}; "
                "lower the budget or give a longer text"
            )
        if too_short:
            say(f"{file}: left out {too_short} documents with fewer tokens than {option} {budget}")
        if cut:
            say(f"{file}: {cut} of {taken} documents have fewer than --tokens {tokens}; scored with what they have")
        if count is not None and taken < count:
            say(f"{file}: {taken} documents, fewer than --documents {count}")
        texts.append(Text(file=str(file), sha256=sha256_of(file), documents=taken, tokens=kept))
    return texts, documents


def check_same_tokens(one: LoadedModel, other: LoadedModel, files: Sequence[Path]) -> None:
    """Raise UserError unless two models encode text as the same ids, sinks aside: losses are compared by token."""
    vocabularies = []
    for loaded in (one, other):
        sinks = sink_ids_of(loaded.model.config)
        names = loaded.tokenizer.get_vocab().items()
        vocabularies.append({name: i for name, i in names if i not in sinks and not UNUSED.fullmatch(name)})
    same = vocabularies[0] == vocabularies[1]
    for file in files if same else ():
        beginning = next(read_documents(file), "")[:20_000]
        same = same and encode(one, beginning) == encode(other, beginning)
    if not same:
        raise UserError(
            f"{one.name} and {other.name} have different tokenizers ({len(vocabularies[0])} and {len(vocabularies[1])} "
            "text tokens), so their losses cannot be compared; give models that were trained on the same tokens"
        )


def check_positions(
    loaded: LoadedModel, longest: int, policies: Sequence[Policy], option: str = "--budget", within: str = ""
) -> None:
    """Check that the policies stay within the positions that the model was made for.

    A budget beyond these positions is a mistake, and raises UserError. Dense attention beyond them is a result, and is
    only reported. It raises UserError if the model cannot continue, or changes its positions there (`end_of`).

    Args:
        longest: tokens fed in the longest stream.
        option: the option that sets the budget, for messages.
        within: how the user can keep the stream within the positions, for messages about dense.
    """
    end = end_of(loaded.model)
    positions = end if loaded.positions is None else loaded.positions
    for policy in policies:
        keys = policy.keys_seen(longest)
        if policy.budget is None and end is not None and keys > end:
            remedy = within if within and end == loaded.positions else f"use texts shorter by {keys - end}"
            raise UserError(
                f"{policy.label} reaches position {longest - 1}, and {loaded.name} keeps its rotary frequencies only "
                f"up to {end}; {remedy}"
            )
        if positions is None or keys <= positions:
            continue
        if policy.budget is not None:
            beyond = policy.keys_seen(sys.maxsize) - policy.budget  # for a full cache; this one may not be full
            raise UserError(
                f"{policy.label} takes {keys} positions and {loaded.name} was made for {positions}; use {option} "
                f"{positions - beyond} or less"
            )
        say(
            f"{policy.label} reaches position {longest - 1}, and {loaded.name} was made for {positions} positions: "
            f"its rows show what happens beyond them{within and f' ({within})'}"
        )


def fed(documents: Sequence[Sequence[int]]) -> int:
    """Tokens fed of the longest document, sinks included: all but its last, which is only predicted."""
    return max(map(len, documents)) - 1
