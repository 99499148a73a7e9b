"""Trainings and measurements on one HTML page, and as Markdown for a model card (`sink-eval report`).

    report.html   a summary and the verdict come first; one self-contained file, without scripts or requests to servers
    report.md     the same content
    figures/      every figure as PNG, and its numbers as CSV

The same input gives the same bytes. `inputs` reads, `sections/` choose what is shown, `page` writes HTML and Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.report.blocks import Chart, Section
from eval.report.inputs import Inputs, once, read_maps, read_result_file, read_runs
from eval.report.page import html, markdown
from eval.report.sections import attention, memories, perplexity, provenance, summary, tasks, training, verdict
from sinkmodel.console import say
from sinkmodel.files import atomic_folder, write_csv


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
