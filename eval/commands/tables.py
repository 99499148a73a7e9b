"""Tables of numbers in the terminal. Only printing one needs rich."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

from sinkmodel.console import put
from sinkmodel.results.parts import PolicyFields

if TYPE_CHECKING:
    from rich.table import Table


def new_table(title: str, caption: str, first: list[str], numbers: list[str]) -> Table:
    """An empty table: columns `first` for text, aligned left, then columns `numbers`, aligned right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD)
    for name in first:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def show(table: Table) -> None:
    from rich.console import Console

    # Not printed to stdout directly: rich ends the process if stdout is a closed pipe.
    text = io.StringIO()
    console = Console(file=text, force_terminal=sys.stdout.isatty())
    console.width = max(console.width, 140)  # lines that wrap are better than columns that are cut off
    console.print(table)
    put(text.getvalue().removesuffix("\n"))


def number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def mebibytes(value: float | None, form: str) -> str:
    return number(None if value is None else value / 2**20, form)


def percent(share: float | None, form: str) -> str:
    return number(None if share is None else 100 * share, form)


def keys_seen(row: PolicyFields) -> str:
    """How many keys a query saw: one number, or a range if each window scores several queries."""
    most = row.keys_seen or 0
    return span(row.keys_seen_least or most, most)


def span(least: float | None, most: float | None) -> str:
    return f"{most}" if least == most else f"{least}–{most}"


def interval_of(low: float | None, high: float | None) -> str:
    return "–" if low is None else f"[{low:.2f}, {high:.2f}]"
