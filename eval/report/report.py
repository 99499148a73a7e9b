"""`sink-eval report`: trainings and measurements on one HTML page, and as Markdown for a model card.

    report.html   the verdict comes first; one self-contained file, without scripts or requests to servers
    report.md     the same content
    figures/      every figure as PNG, and its numbers as CSV

The same input gives the same bytes. `inputs` reads, `sections/` choose what is shown, `page` writes HTML and Markdown.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.files import atomic_folder, refuse_if_occupied
from sinkmodel.parser import path_of

if TYPE_CHECKING:
    from eval.report.blocks import Chart, Section
    from eval.report.inputs import Inputs

DESCRIPTION = "A page with the verdict and all other measurements: report.html, report.md, figures as PNG and CSV."
EXAMPLE = "sink-eval report --run runs/none runs/token --json verify.json grid.json ppl.json --output report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", nargs="+", type=path_of, default=[], metavar="RUN", help="run folders of sink-pretrain, usually twins"
    )
    parser.add_argument(
        "--json",
        nargs="+",
        type=path_of,
        default=[],
        metavar="FILE",
        help="files that sink-eval ppl, verify, grid, sinks, streameval, zeroshot, latency, memories or longcontext "
        "wrote with --json",
    )
    parser.add_argument(
        "--maps",
        nargs="+",
        type=path_of,
        default=[],
        metavar="FOLDER",
        help="folders that sink-eval sinks --maps wrote",
    )
    parser.add_argument("--output", required=True, type=path_of, metavar="FOLDER", help="new folder for the report")


def run(options: argparse.Namespace) -> None:
    """Write the report. Raises UserError for an invalid file before anything is drawn."""
    if not options.run and not options.json and not options.maps:
        raise UserError("nothing to report; give --run, --json or --maps")
    refuse_if_occupied(options.output)
    from eval.report.blocks import Chart
    from eval.report.inputs import Inputs, once, read_maps, read_result, read_runs
    from eval.report.page import html, markdown

    runs, results, maps = map(once, (options.run, options.json, options.maps))
    inputs = Inputs(read_runs(runs), list(map(read_result, results)), list(map(read_maps, maps)))
    sections = make_sections(inputs)
    with atomic_folder(options.output) as folder:
        (folder / "figures").mkdir()
        for section in sections:
            for block in section.blocks:
                if isinstance(block, Chart):
                    _write_chart(folder, block)
        (folder / "report.html").write_text(html(sections), encoding="utf-8")
        (folder / "report.md").write_text(markdown(sections), encoding="utf-8")
    say(f"wrote {options.output / 'report.html'} and report.md")


def make_sections(inputs: Inputs) -> list[Section]:
    """The sections that have inputs, in the order of a reader's questions; then a list of the missing ones."""
    from eval.report.sections import attention, memories, perplexity, provenance, tasks, training, verdict

    shown = [
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
    if "verdict" not in there:
        made.insert(0, provenance.no_verdict())
    return [
        section for section in (*made, provenance.missing(there), provenance.section(inputs)) if section is not None
    ]


def _write_chart(folder: Path, chart: Chart) -> None:
    for path, panel in chart.files:
        (folder / path).write_bytes(panel.png)
    write_csv(folder / chart.csv, chart.columns, chart.rows)


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
