"""What the results of several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sinkmodel.results.schema import Number, omitted

SCHEMA = 1  # the version of the form of all results; files of before have no version and the same form


@dataclass(frozen=True, kw_only=True)
class Result:
    """A result of `sink-eval COMMAND`, which its --json writes.

    Attributes:
        COMMAND: the name of the command.
        command_line: the command line, without output paths.
        date: when the file was written, as ISO 8601 in UTC.
        versions: versions of Python and of packages; `products`: the library of matrix products (`sinkmodel.products`).
    """

    COMMAND: ClassVar[str]

    command_line: str | None = omitted()
    date: object = omitted()
    versions: object = omitted()


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text that was read; a command records what it used of it.

    Attributes:
        task: the task that the file is, for zero-shot tasks.
        file: its path as it was given.
        sha256: its digest.
        documents: documents used.
        tokens: tokens used.
        sequences: sequences used.
        sentences: sentences used.
        characters: characters used.
        rows: rows used.
    """

    task: str | None = omitted()
    file: str
    sha256: str
    documents: int | None = omitted()
    tokens: int | None = omitted()
    sequences: int | None = omitted()
    sentences: int | None = omitted()
    characters: int | None = omitted()
    rows: int | None = omitted()


@dataclass(frozen=True, kw_only=True)
class PolicyFields:
    """A cache policy, as the rows that measure it describe it (`eval.policies.policy`).

    Attributes:
        policy: its name.
        label: its name with S+W; empty in files of older versions.
        sinks: S, leading tokens that are never evicted.
        window: W; None for an unbounded cache.
        budget: C; None for an unbounded cache.
        keys_seen: the most keys that a query sees.
        needs: what it needs to see of attention.
        keeps: which keys it keeps, in words.
        positions: what positions of kept keys count in.
        stride: for recompute, queries that a window scores.
        keys_seen_least: for recompute, the fewest keys that a query sees.
    """

    policy: str
    label: str = ""
    sinks: int
    window: Number
    budget: Number = None
    keys_seen: Number = None
    needs: str | None = None
    keeps: str | None = None
    positions: str | None = None
    stride: int | None = omitted()
    keys_seen_least: int | None = omitted()

    @property
    def name(self) -> str:
        """The label, or the same from its parts."""
        split = "" if self.window is None else f" {self.sinks}+{self.window}"
        return self.label or self.policy + split
