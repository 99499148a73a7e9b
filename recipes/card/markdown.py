"""A card as text: what of one is metadata, what was written by hand, and how a word stands in it as it is."""

from __future__ import annotations

import re
from typing import Any

import yaml

from sinkmodel.errors import UserError, first_line

BEGIN = "<!-- written by hand: begin -->"
END = "<!-- written by hand: end -->"
EMPTY = "\n\n"  # a section without a word
FRONT = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


def split_by_hand(card: str, where: str) -> str:
    """What stands between the two comments, byte for byte.

    All of a card that has neither, but its metadata: then somebody wrote it. UserError where one of the two is
    missing, or stands there twice: nobody can say what is to be kept.
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
    """The metadata on top of a card; empty where there is none. UserError where it cannot be read."""
    found = FRONT.match(card)
    if found is None:
        return {}
    try:
        said = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise UserError(f"the metadata of the card there is not valid YAML ({first_line(error)}); repair it") from None
    if not isinstance(said, dict | None):
        raise UserError("the metadata of the card there is not keys and values; repair it")
    return {str(key): value for key, value in (said or {}).items()}
