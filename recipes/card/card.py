"""The model card: the README.md of a model folder, generated from facts about the model, again at every push.

    card = make_card(Path("models/sink"), repository="org/sink", run=Path("runs/sink"), report=Path("report"))
    card.write(Path("models/sink"))

`facts` reads what the model is and how it was trained, `results` and `report` read what was measured, and `metadata`
makes the YAML for the Hub. The owner's own words are kept: the text between two comments, and metadata such as the
licence. The same input gives the same bytes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from recipes.card.facts import GGUF, PROVENANCE, Facts, Point, gather
from recipes.card.metadata import metadata
from recipes.card.report import TRAINING, Report, read_report
from recipes.card.results import Measured, read_results
from recipes.card.rows import citation, last_of, model_rows, training_rows
from sinkmodel.bounds import inside
from sinkmodel.errors import UserError, first_line
from sinkmodel.files import atomic_file, read_json
from sinkmodel.markdown import code_span, escaped, link, one_line
from sinkmodel.secrets import all_redacted

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

README = "README.md"
CURVE = "figures/loss.png"  # of the run, in a card without a report
BEGIN = "<!-- written by hand: begin -->"
END = "<!-- written by hand: end -->"
EMPTY = "\n\n"  # an empty section
FRONT = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Card:
    text: str
    report: Report
    points: Sequence[Point] = ()  # of the loss curve that the card shows; empty if the report has a curve

    def write(self, folder: Path) -> None:
        """Write the figures, then README.md; other files in `folder` are not touched."""
        self.report.copy_figures(folder)
        if self.points:
            draw_curve(folder / CURVE, self.points)
        with atomic_file(folder / README) as aside:
            aside.write_bytes(self.text.encode("utf-8"))


def make_card(
    folder: Path,
    *,
    repository: str,
    run: Path | None = None,
    report: Path | None = None,
    results: Sequence[Path] = (),
    previous: str | None = None,
) -> Card:
    """Make the card of a model folder; call `write` to write it.

    Args:
        folder: a folder that sink-export wrote.
        repository: ORG/NAME, for the examples.
        run: the run that trained the model, for the loss curve; None draws none.
        report: a folder of sink-eval report, for the card's results.
        results: files of sink-eval --json, for the metadata, and for a table if there is no report.
        previous: the card on the Hub, whose hand-written section is kept; None keeps that of the folder's README.md.

    Raises UserError for a file or folder of the wrong kind.
    """
    facts = gather(folder, repository, run)
    shown = Report() if report is None else read_report(report)
    measured = read_results(results, own_names(folder, facts, run))
    old, by_hand = kept_of(folder / README, previous)
    draws = TRAINING not in shown.sections and bool(curve_lines(facts.points))
    body = render(facts, shown, measured, by_hand, alternative_of(facts.points) if draws else None, old)
    return Card(body, shown, facts.points if draws else ())


def own_names(folder: Path, facts: Facts, run: Path | None) -> Callable[[str], bool]:
    """A function that returns whether a name in a result means this model.

    It does if it names the model's repository, its folder or a copy of it, or its checkpoint. The name of a run means
    its last checkpoint, so it counts only if the model is that checkpoint.
    """
    names, places = {facts.repository}, {folder.resolve()}
    if run is not None and isinstance(facts.training.get("checkpoint"), str):
        places.add(inside(run / "checkpoints", facts.training["checkpoint"], folder / PROVENANCE).resolve())
    if facts.complete:
        names |= {facts.output} if facts.output else set()
        places |= {run.resolve()} if run is not None else set()

    def own(name: str) -> bool:
        if name in names or Path(name).resolve() in places:
            return True
        copy = Path(name) / PROVENANCE
        return copy.is_file() and all_redacted(read_json(copy)) == facts.training

    return own


def render(
    facts: Facts,
    report: Report,
    measured: Sequence[Measured],
    by_hand: str = EMPTY,
    curve_alternative: str | None = None,
    old: dict[str, Any] | None = None,
) -> str:
    """The card's text: metadata as YAML, then Markdown.

    Args:
        by_hand: the hand-written section.
        curve_alternative: the alternative text of the card's own loss curve; None if it has no such curve.
        old: the metadata of the old card.
    """
    return fill(
        "card.md.jinja",
        metadata(facts, measured, old or {}),
        by_hand,
        facts=facts,
        model=model_rows(facts),
        training=training_rows(facts),
        writes_gguf=facts.config.get("model_type") in GGUF,
        measured=measured,
        sections={title: text for title, text in report.sections.items() if title != TRAINING},
        curves=report.sections.get(TRAINING),
        curve=None if curve_alternative is None else f"![{escaped(curve_alternative)}]({CURVE})",
        compared=_compared(report, measured),
        tasks=_has_tasks(report, measured),
        citation=citation(facts.training),
    )


def fill(template: str, data: ModelCardData, by_hand: str, **values: Any) -> str:
    """A template's text, with the metadata and what was written by hand."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("recipes.card"),
        autoescape=False,  # Markdown, not HTML: `md`, `code` and `link` escape; in code blocks, `line` and `sh`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": escaped, "code": code_span, "link": link, "line": one_line, "sh": shlex.quote}
    environment.filters["n"] = "{:,}".format
    text = environment.get_template(template).render(
        metadata=data.to_yaml(line_break="\n"),
        licence=data.license,
        licence_name=data.get("license_name"),
        licence_link=data.get("license_link"),
        by_hand=by_hand,
        **values,
    )
    split_by_hand(text, "this card, with the names and the report that it is made from,")
    return text


def _compared(report: Report, measured: Sequence[Measured]) -> bool:
    there = report.sections.get("The verdict", "No verdict yet")
    return "No verdict yet" not in there or any(one.metric == "nll_difference" for one in measured)


def _has_tasks(report: Report, measured: Sequence[Measured]) -> bool:
    return "Zero-shot tasks" in report.sections or any("zero-shot" in one.what for one in measured)


# --------------------------------------------------------------------------------------------------------- the old card


def kept_of(here: Path, previous: str | None) -> tuple[dict[str, Any], str]:
    """(metadata, hand-written section) of the old card: that on the Hub if there is one, else that of the folder.

    UserError if both cards have hand-written sections and these differ: one would be lost.
    """
    try:
        local = here.read_bytes().decode("utf-8") if here.is_file() else None
    except UnicodeDecodeError:
        raise UserError(f"{here} is not text in UTF-8; repair or remove it") from None
    cards = {"the card on the Hub": previous, str(here): local}
    sections = [split_by_hand(card, where) for where, card in cards.items() if card is not None]
    written = [section for section in sections if section.strip()]
    if len(set(written)) > 1:
        raise UserError(
            f"{here} and the card on the Hub have different hand-written sections; put both into the one on the Hub "
            f"and delete {here}"
        )
    newest = previous if previous is not None else local
    return {} if newest is None else front_matter(newest), [*written, *sections, EMPTY][0]


def split_by_hand(card: str, where: str) -> str:
    """The text between the two comments, byte for byte.

    A card without both comments was written by hand: all of it is returned, except the metadata. Raises UserError if
    only one of the two is there, or one is there twice: then it is not known which text to keep.
    """
    if BEGIN not in card and END not in card:
        text = FRONT.sub("", card).strip()
        return f"\n\n{text}\n\n" if text else EMPTY
    before, begin, rest = card.partition(BEGIN)
    section, end, after = rest.partition(END)
    if not begin or not end or any(mark in part for mark in (BEGIN, END) for part in (before, section, after)):
        raise UserError(f"{where} must have {BEGIN} and {END} once each, in this order; repair it by hand")
    return section


def front_matter(card: str) -> dict[str, Any]:
    """The metadata at the top of a card; empty if there is none. UserError if it cannot be read."""
    found = FRONT.match(card)
    if found is None:
        return {}
    try:
        content = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise UserError(f"the metadata of the old card is not valid YAML ({first_line(error)}); repair it") from None
    if not isinstance(content, dict | None):
        raise UserError("the metadata of the old card is not a mapping of keys to values; repair it")
    return {str(key): value for key, value in (content or {}).items()}


# ------------------------------------------------------------------------------------------------------- the loss curve


def curve_lines(points: Sequence[Point]) -> dict[str, list[tuple[float, float]]]:
    """(tokens, nats per token) of each measured loss. A point without tokens takes those of the point before it."""
    lines: dict[str, list[tuple[float, float]]] = {}
    tokens = 0.0
    for point in points:
        tokens = point.get("tokens") or tokens
        for name, column in (("training", "twin_loss"), ("held out", "val_loss")):
            value = point.get(column)
            if value is not None:
                lines.setdefault(name, []).append((tokens, value))
    return lines


def alternative_of(points: Sequence[Point]) -> str:
    """The alternative text of the curve."""
    ends = {"training": last_of(points, "twin_loss"), "held-out": last_of(points, "val_loss")}
    losses = " and ".join(f"{name} loss {value:.3f}" for name, value in ends.items() if value is not None)
    return f"Loss over tokens; at the end {losses} nats per token"


def draw_curve(path: Path, points: Sequence[Point]) -> None:
    """Draw the curve: training loss as a line, held-out loss as hollow marks.

    The same points give the same bytes, so that a push finds no change.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9.5}):
        figure = Figure(figsize=(5.0, 3.1), layout="constrained")
        axis = figure.add_subplot()
        for (name, line), style in zip(curve_lines(points).items(), ("-", "o")):
            axis.plot(*zip(*line), style, label=name, color="#0072B2", markerfacecolor="none", linewidth=1.4)
        axis.set(xlabel="tokens", ylabel="nats per token")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(True, alpha=0.3)
        axis.legend(frameon=False)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=160, format="png", facecolor="white", metadata={"Software": None})
