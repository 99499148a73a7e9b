"""A cache policy: which cached keys a query sees, and at which positions.

    dense          every key so far, at its true position
    window  0+C    the C latest keys, no sinks (StreamingLLM's "window attention")
    sink    S+W    the first S keys, kept for good, and the W = C − S latest, placed right behind them

All three are settings of the two scorers of `sinkmodel.scoring`. A policy that looks at attention before it evicts
gets a file of its own here, with the same two things: a label, and a `score`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sinkmodel.errors import UserError

NAMES = ("dense", "window", "sink")


@dataclass(frozen=True)
class Policy:
    name: str
    sinks: int = 0
    budget: int | None = None  # C, cache slots with the current token; None: without bound

    @property
    def window(self) -> int | None:
        return None if self.budget is None else self.budget - self.sinks

    @property
    def label(self) -> str:
        return "dense" if self.budget is None else f"{self.name} {self.sinks}+{self.window}"

    def score(self, model: Any, documents: Sequence[Sequence[int]], chunk: int, on_chunk: Callable[[int], None]) -> Any:
        """−log p of every next token, one fp32 tensor [T − 1] a document of T ids."""
        from sinkmodel.scoring import dense_nll, streaming_nll

        if self.budget is None:
            return dense_nll(model, documents, chunk, on_chunk)
        return streaming_nll(model, documents, self.budget, self.sinks, chunk, on_chunk)


def choose(names: Sequence[str] | None, sinks: Sequence[int], budget: int) -> list[Policy]:
    """One policy a row. No sinks is the window where `window` is asked for, else the sink policy with S = 0.

    `names` None means window and sink, with a window only where `sinks` has a 0; asked for by name it always comes.
    """
    for count in sinks:
        if budget < count + 1:
            raise UserError(
                f"--budget {budget} does not hold --sinks {count} and the current token; "
                f"make the budget at least {count + 1} or the sinks fewer"
            )
    explicit, names = names is not None, names or ("window", "sink")
    rows = []
    for name in dict.fromkeys(names):
        if name == "dense":
            rows.append(Policy("dense"))
        elif name == "window" and (explicit or 0 in sinks):
            rows.append(Policy("window", 0, budget))
        elif name == "sink":
            rows += [Policy("sink", count, budget) for count in dict.fromkeys(sinks) if count or "window" not in names]
    return rows
