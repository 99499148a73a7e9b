"""The names of the policies on the command line, and checks of the options that choose them."""

from __future__ import annotations

from collections.abc import Sequence

from sinkmodel.errors import UserError

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


def check_stride(policies: Sequence[str] | None, stride: int, budget: int, sinks: int) -> None:
    """Raise UserError unless a recomputed window holds the model's own sinks and all queries that it scores."""
    if "recompute" not in (policies or ()):
        if stride > 1:
            raise UserError("--stride is only for recompute; add recompute to --policies or leave --stride out")
        return
    after_sinks = f" after the model's {sinks} sink tokens" if sinks else ""
    if budget <= sinks:
        raise UserError(f"--budget {budget} leaves no window{after_sinks}; make it at least {sinks + 1}")
    if stride > budget - sinks:
        raise UserError(
            f"--stride {stride} does not fit into a window of {budget - sinks} tokens{after_sinks}; "
            f"use {budget - sinks} or less"
        )
