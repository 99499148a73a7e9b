"""What a report is made of, before it is HTML or Markdown: sections of tables, charts, notes and code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

LONGEST = 30  # letters of a name in a figure


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1  # first columns that are words; the others are numbers, to the right
    caption: str = ""
    kind = "table"


@dataclass(frozen=True)
class Panel:
    alt: str  # what it shows, in words
    svg: str  # an <svg> element that takes its colours from the page
    png: bytes  # the same, dark on white


@dataclass(frozen=True)
class Chart:
    """Panels that belong together, and their numbers: `figures/NAME.csv`, and `figures/NAME.png` or `NAME-1.png` …"""

    name: str
    panels: Sequence[Panel]
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    small: bool = False  # many beside each other
    kind = "chart"

    @property
    def csv(self) -> str:
        return f"figures/{self.name}.csv"

    @property
    def files(self) -> list[tuple[str, Panel]]:
        """(path of the PNG, panel) of each."""
        names = [self.name] if len(self.panels) == 1 else [f"{self.name}-{i + 1}" for i in range(len(self.panels))]
        return [(f"figures/{name}.png", panel) for name, panel in zip(names, self.panels)]


@dataclass(frozen=True)
class Note:
    text: str
    tone: str = "plain"  # or good, bad, open: an answer; warning
    head: str = ""
    kind = "note"


@dataclass(frozen=True)
class Code:
    title: str
    text: str
    kind = "code"


@dataclass
class Section:
    key: str  # its anchor
    title: str
    blocks: list[Table | Chart | Note | Code] = field(default_factory=list)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Each name's last part, as `sink` of `runs/sink`; the whole of those that would be mixed up."""
    unique = list(dict.fromkeys(names))
    last = {name: PurePath(name).name or name for name in unique}
    return {name: short if list(last.values()).count(short) == 1 else name for name, short in last.items()}


def stream_name(row: dict[str, Any]) -> str:
    """S+W where that says it all; else the policy's label, which results of older versions lack."""
    if row["policy"] in ("window", "sink"):
        return f"{row['sinks']}+{row['window']}"
    return row.get("label") or row["policy"]


def figure(value: float | None, form: str = ",.2f") -> str:
    """A number in a table; one that is too long for its form, as the perplexity of a model that fails, in short."""
    if value is None:
        return "–"
    if abs(value) >= 1e7 and form.endswith("f"):
        form = "+.3g" if form.startswith("+") else ".3g"
    return format(value, form).replace("-", "−")


def between(low: float | None, high: float | None, form: str) -> str:
    return "–" if low is None or high is None else f"[{figure(low, form)},\u00a0{figure(high, form)}]"
