"""A report of `sink-eval report` as a part of a card: its Markdown, and the figures in it."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from sinkmodel.bounds import real
from sinkmodel.errors import UserError

TRAINING = "Training of the twins"
LEFT_OUT = ("Not in this report",)  # it holds commands for the person who measures
FIGURE = re.compile(r"\]\((figures/[\w.-]+)\)")
# A run's config.yaml, folded. It is left out: it names folders of a user's machine, and training.json has the config.
CONFIG = re.compile(r"<details><summary>[^\n]*config\.yaml</summary>\n\n(`{3,})\n.*?\n\1\n\n</details>\n*", re.DOTALL)


@dataclass
class Report:
    folder: Path | None = None
    sections: dict[str, str] = field(default_factory=dict)  # title -> Markdown

    @property
    def figures(self) -> list[str]:
        return list(dict.fromkeys(path for text in self.sections.values() for path in FIGURE.findall(text)))

    def copy_figures(self, folder: Path) -> None:
        """Copy the figures to `folder`/figures, the path that the Markdown uses."""
        assert self.folder is not None or not self.figures
        for path in self.figures:
            (folder / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(real(self.folder, self.folder / path), folder / path)  # type: ignore[arg-type, operator]


def read_report(folder: Path) -> Report:
    """Raises UserError if the folder is not a report, or if a figure is missing or is a link that leads out of it."""
    path = folder / "report.md"
    try:
        text = real(folder, path).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} has no report.md; give a folder that sink-eval report made") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text; make the report again with sink-eval report") from None
    parts = re.split(r"^## (.+)\n", CONFIG.sub("", text), flags=re.MULTILINE)
    sections = {title: body.strip() for title, body in zip(parts[1::2], parts[2::2]) if title not in LEFT_OUT}
    if not sections:
        raise UserError(f"{path} has no section; make the report again with sink-eval report")
    report = Report(folder, sections)
    for figure in report.figures:
        if not real(folder, folder / figure).is_file():
            raise UserError(f"{folder} lacks {figure}, which report.md shows; make the report again")
    return report
