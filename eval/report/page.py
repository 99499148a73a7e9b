"""A report as one self-contained HTML page, and as Markdown for a model card."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from eval.report.blocks import Chart, Code, Note, Section, Table
from eval.report.charts import with_prefix
from sinkmodel.markdown import escaped, one_line

TITLE = "Sink report"


def html(sections: Sequence[Section]) -> str:
    """The HTML page. All text is escaped; only the figures from `eval.report.charts` are inserted unescaped."""
    environment = Environment(
        loader=PackageLoader("eval.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    assert environment.loader is not None
    css = Markup(environment.loader.get_source(environment, "page.css")[0])
    return environment.get_template("page.html").render(title=TITLE, css=css, sections=sections, drawn=_drawn)


def _drawn(chart: Chart) -> list[Markup]:
    return [Markup(with_prefix(panel.svg, f"{chart.name}-{i}-")) for i, panel in enumerate(chart.panels, 1)]


# ----------------------------------------------------------------------------------------------------------- Markdown


def markdown(sections: Sequence[Section]) -> str:
    parts = [f"# {TITLE}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [_write(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _write(block: Table | Chart | Note | Code) -> str:
    if isinstance(block, Note):
        return f"**{escaped(block.head)}:** {escaped(block.text)}" if block.head else escaped(block.text)
    if isinstance(block, Code):
        fence = "`" * (1 + max([2, *(len(run) for run in re.findall("`+", block.text))]))
        opening = f"<details><summary>{escape(one_line(block.title))}</summary>"
        return "\n\n".join([opening, f"{fence}\n{block.text.rstrip()}\n{fence}", "</details>"])
    if isinstance(block, Chart):
        images = [f"![{escaped(panel.alt)}]({path})" for path, panel in block.files]
        return "\n".join([*images, "", f"{escaped(block.caption)} [Numbers as CSV]({block.csv})".strip()])
    rule = ["---" if i < block.words else "---:" for i in range(len(block.columns))]
    rows = [[escaped(cell) for cell in row] for row in (block.columns, *block.rows)]
    lines = [f"| {' | '.join(cells)} |" for cells in (rows[0], rule, *rows[1:])]
    return "\n".join([*lines, "", escaped(block.caption)] if block.caption else lines)
