"""Parts of a result in words, as both the tables in the terminal and the report show them."""

from __future__ import annotations

from typing import Any

ENOUGH = 5  # fewest rounds for an interval of a crossover


def each_pair(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The verdict of each pair of runs, as rows of the table of comparisons; empty if there is only one pair."""
    pairs = content.get("pairs", [])
    return [{**row, "model": "pair", "first": row["sink"], "second": row["vanilla"]} for row in pairs if len(pairs) > 1]


def answer_cell(row: dict[str, Any]) -> str:
    """The answer of a row for a table; it names the texts that the answer is for unless that is the default."""
    if not row["answer"]:
        return row.get("why") or "too little text"
    if row.get("why"):
        return f"{row['answer']} for other texts"
    return f"{row['answer']} for these texts" if row.get("speaks_of") == "these texts" else str(row["answer"])


def tokens_or_never(value: float | None) -> str:
    return "never" if value is None else f"{value:,.0f}"


def crossover_range(pair: dict[str, Any]) -> str:
    """`[low, high]`; a dash if there are too few rounds for an interval."""
    if pair["rounds"] < ENOUGH:
        return "–"
    if pair["low"] is None:
        return "never"
    return f"[{tokens_or_never(pair['low'])}, {tokens_or_never(pair['high'])}]"
