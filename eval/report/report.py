"""Trainings and measurements on one HTML page, and as Markdown for a model card (`sink-eval report`).

    report.html   a summary and the verdict come first; one self-contained file, without scripts or requests to servers
    report.md     the same content
    figures/      every figure as PNG, and its numbers as CSV

The same input gives the same bytes. `inputs` reads, `sections/` choose what is shown, and this module writes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from eval.report.blocks import Chart, Code, Note, Section, Table
from eval.report.charts import with_prefix
from eval.report.inputs import Inputs, once, read_maps, read_result_file, read_runs
from eval.report.sections import attention, memories, perplexity, provenance, summary, tasks, training, verdict
from sinkmodel.console import say
from sinkmodel.files import atomic_folder, write_csv
from sinkmodel.markdown import escaped, one_line

TITLE = "Sink report"


def write_report(output: Path, runs: Sequence[Path], results: Sequence[Path], maps: Sequence[Path]) -> None:
    """Write the report into a new folder. Raises UserError for an invalid file before anything is drawn."""
    runs, results, maps = map(once, (runs, results, maps))
    inputs = Inputs(read_runs(runs), list(map(read_result_file, results)), list(map(read_maps, maps)))
    sections = make_sections(inputs)
    with atomic_folder(output) as folder:
        (folder / "figures").mkdir()
        for section in sections:
            for block in section.blocks:
                if isinstance(block, Chart):
                    _write_chart(folder, block)
        (folder / "report.html").write_text(html(sections), encoding="utf-8")
        (folder / "report.md").write_text(markdown(sections), encoding="utf-8")
    say(f"wrote {output / 'report.html'} and report.md")


def make_sections(inputs: Inputs) -> list[Section]:
    """A summary, the sections that have inputs in the order of a reader's questions, and a list of the missing ones."""
    shown = [
        summary.section,
        verdict.section,
        perplexity.grid,
        training.section,
        perplexity.positions,
        perplexity.budgets,
        attention.layers,
        attention.births,
        attention.maps,
        tasks.zeroshot,
        tasks.streameval,
        tasks.latency,
        memories.prefill,
        memories.memories,
        memories.longcontext,
    ]
    made = [section for show in shown if (section := show(inputs)) is not None]
    there = [section.key for section in made]
    return [
        section for section in (*made, provenance.missing(there), provenance.section(inputs)) if section is not None
    ]


def _write_chart(folder: Path, chart: Chart) -> None:
    for path, panel in chart.files:
        (folder / path).write_bytes(panel.png)
    write_csv(folder / chart.csv, chart.columns, chart.rows)


# ----------------------------------------------------------------------------------------------------------------- HTML


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
        parts += [_markdown_of(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown_of(block: Table | Chart | Note | Code) -> str:
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
