"""The policies of a table, chosen by name."""

from __future__ import annotations

from collections.abc import Sequence

from eval.policies.caches import Dense, Streaming
from eval.policies.policy import Policy
from eval.policies.recompute import Recompute
from sinkmodel.choices import Convention


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
    explicit, names = names is not None, names or ("window", "sink")
    rows: list[Policy] = []
    for name in dict.fromkeys(names):
        kind, _, paper = name.partition("-")
        convention: Convention = "paper" if paper else "inclusive"
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
