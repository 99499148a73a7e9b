"""Reads a card's text: its metadata, and its hand-written section."""

from __future__ import annotations

import re
from typing import Any

import yaml

from sinkmodel.errors import UserError, first_line

BEGIN = "<!-- written by hand: begin -->"
END = "<!-- written by hand: end -->"
EMPTY = "\n\n"  # an empty section
FRONT = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


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
