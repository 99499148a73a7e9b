"""`sink-eval report`: trainings and measurements on one HTML page, and as Markdown for a model card.

`eval.report.report` writes it.
"""

from __future__ import annotations

import argparse

from sinkmodel.errors import UserError
from sinkmodel.files import refuse_if_occupied
from sinkmodel.parser import path_of

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
    if not options.run and not options.json and not options.maps:
        raise UserError("nothing to report; give --run, --json or --maps")
    refuse_if_occupied(options.output)
    from eval.report import report

    report.write_report(options.output, options.run, options.json, options.maps)
