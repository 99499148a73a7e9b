"""Collects the results of slurm/eval.sbatch, FOLDER/step*.json, in one table: FOLDER/table.csv and FOLDER/table.md.

Every task of the array calls it after each result. So two may run at a time, and no lock is reliable across nodes. Each
lists the results again after writing its table, and starts over if there is a new one. So the last table written holds
all of them.

Example: python slurm/collect.py runs/sink/ppl
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sinkmodel.console import command, say
from sinkmodel.errors import UserError
from sinkmodel.files import atomic_file, write_csv
from sinkmodel.parser import path_of
from sinkmodel.results.files import read_kind
from sinkmodel.results.perplexity import PerplexityResult, PerplexityRow

COLUMNS = ("policy", "sinks", "window", "budget", "documents", "tokens")
NUMBERS = ("nll", "nll_after_overflow", "ppl", "ppl_after_overflow", "stderr")


def results(folder: Path) -> dict[int, Path]:
    """The result files by step, in the order of the steps."""
    found = {int(match[1]): path for path in folder.glob("step*.json") if (match := re.search(r"step(\d+)", path.stem))}
    return dict(sorted(found.items()))


def collect(folder: Path) -> int:
    """Write both tables; returns the number of checkpoints in them. Raises UserError if there is no result."""
    while True:
        seen = results(folder)
        if not seen:
            raise UserError(f"{folder} holds no step*.json; give the folder that slurm/eval.sbatch wrote")
        rows = [(step, row) for step, path in seen.items() for row in read_kind(path, PerplexityResult).rows]
        cells = [[step, *(getattr(row, name) for name in (*COLUMNS, *NUMBERS))] for step, row in rows]
        write_csv(folder / "table.csv", ("step", *COLUMNS, *NUMBERS), cells)
        with atomic_file(folder / "table.md") as aside:
            aside.write_text(markdown(rows), encoding="utf-8")
        if results(folder).keys() == seen.keys():
            return len(seen)


def markdown(rows: list[tuple[int, PerplexityRow]]) -> str:
    lines = [["step", *COLUMNS, *NUMBERS], ["--:"] * (1 + len(COLUMNS) + len(NUMBERS))]
    for step, row in rows:
        words = [str(step), *(_cell(getattr(row, name)) for name in COLUMNS)]
        numbers = [getattr(row, name) for name in NUMBERS]
        lines.append(words + ["" if number is None else f"{number:.4f}" for number in numbers])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: str | float | None) -> str:
    return "" if value is None else str(value)


@command("collect.py")
def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise UserError("give one folder, as in: python slurm/collect.py runs/sink/ppl")
    count = collect(path_of(argv[0]))
    say(f"{argv[0]}/table.csv and table.md hold {count} checkpoint(s)")


if __name__ == "__main__":
    sys.exit(main())
