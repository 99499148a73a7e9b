"""The content of a report, before it becomes HTML or Markdown: sections of tables, charts, notes and code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from sinkmodel.results.parts import PolicyFields

LONGEST = 30  # most characters of a name in a figure


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1  # number of leading text columns; the others are numbers, aligned right
    caption: str = ""
    kind = "table"


@dataclass(frozen=True)
class Panel:
    alt: str  # alternative text: what the panel shows
    svg: str  # an <svg> element that takes its colours from the page
    png: bytes  # the same figure, dark on white


@dataclass(frozen=True)
class Chart:
    """Panels that belong together, and their numbers: `figures/NAME.csv`, and `figures/NAME.png` or `NAME-1.png` …"""

    name: str
    panels: Sequence[Panel]
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    small: bool = False  # small panels, many in one row
    kind = "chart"

    @property
    def layout(self) -> str:
        """The class of its panels on the page."""
        return "panels small" if self.small else "panels three" if len(self.panels) == 3 else "panels"

    @property
    def csv(self) -> str:
        return f"figures/{self.name}.csv"

    @property
    def files(self) -> list[tuple[str, Panel]]:
        """(path of the PNG, panel) for each panel."""
        names = [self.name] if len(self.panels) == 1 else [f"{self.name}-{i + 1}" for i in range(len(self.panels))]
        return [(f"figures/{name}.png", panel) for name, panel in zip(names, self.panels)]


@dataclass(frozen=True)
class Note:
    text: str
    tone: str = "plain"  # plain, warning, or for an answer: good, bad, open
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
    """Each name's last part, such as `sink` for `runs/sink`; the whole name if last parts are equal."""
    unique = list(dict.fromkeys(names))
    last = {name: PurePath(name).name or name for name in unique}
    return {name: short if list(last.values()).count(short) == 1 else name for name, short in last.items()}


def stream_name(row: PolicyFields) -> str:
    """S+W for window and sink; for other policies the label, or the name in results of older versions without label."""
    if row.policy in ("window", "sink"):
        return f"{row.sinks}+{row.window}"
    return row.label or row.policy


def figure(value: float | None, form: str = ",.2f") -> str:
    """A number for a table; a huge one, such as the perplexity of a model that fails, in exponential notation."""
    if value is None:
        return "–"
    if abs(value) >= 1e7 and form.endswith("f"):
        form = "+.3g" if form.startswith("+") else ".3g"
    return format(value, form).replace("-", "−")


def between(low: float | None, high: float | None, form: str) -> str:
    return "–" if low is None or high is None else f"[{figure(low, form)},\u00a0{figure(high, form)}]"
