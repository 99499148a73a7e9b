"""The policies that can be named on the command line, and their choice for the rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sinkmodel.errors import UserError

if TYPE_CHECKING:
    from eval.policies.policy import Policy

NAMES = ("dense", "window", "window-paper", "recompute", "sink", "sink-paper")
BORROWED = 4  # leading tokens that StreamingLLM keeps for a model without a sink


def check(sinks: Sequence[int], budget: int, option: str = "--budget") -> None:
    """Raise UserError if the budget does not hold the sinks and the current token."""
    for count in sinks:
        if budget < count + 1:
            raise UserError(
                f"{option} {budget} does not hold --sinks {count} and the current token; "
                f"make the budget at least {count + 1} or the sinks fewer"
            )


def choose(
    names: Sequence[str] | None, sinks: Sequence[int], budget: int, front: int = 0, stride: int = 1
) -> list[Policy]:
    """The policies of a table, one per row. S = 0 is the `window` policy if that is chosen, else `sink` with S = 0.

    Args:
        names: names of policies; None: sink, and also window if `sinks` contains 0.
        sinks: values of S for the sink policy.
        budget: C, the cache slots including the sinks and the current token.
        front: number of the model's own sink tokens, which recompute keeps in front of every window.
        stride: queries that a window of recompute scores.
    """
    from eval.policies.dense import Dense
    from eval.policies.recompute import Recompute
    from eval.policies.streaming import Streaming

    explicit, names = names is not None, names or ("window", "sink")
    rows: list[Policy] = []
    for name in dict.fromkeys(names):
        kind, _, paper = name.partition("-")
        convention = "paper" if paper else "inclusive"
        if name == "dense":
            rows.append(Dense())
        elif name == "recompute":
            rows.append(Recompute(front, budget, stride))
        elif kind == "window" and (explicit or 0 in sinks):
            rows.append(Streaming(name, 0, budget, convention))
        elif kind == "sink":
            without_window = name.replace("sink", "window") not in names
            counts = [count for count in dict.fromkeys(sinks) if count or without_window]
            rows += [Streaming(name, count, budget, convention) for count in counts]
    return rows
