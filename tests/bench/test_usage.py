"""Risk: the usage at the top of a bench names another default than its parser has, and a number is of other sizes."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "bench").rglob("*.py")
    if "ArgumentParser(" in path.read_text(encoding="utf-8") and path.name != "__main__.py"
)
PLACEHOLDER = re.compile(r"[A-Z]+")  # a value that the user chooses; there is no default to name


class Parsed(Exception):
    """Raised in place of parsing, with the parser."""


def defaults_of(module: str, monkeypatch) -> dict[str, object]:
    def parse_args(parser, *args):
        raise Parsed(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed) as caught:
        importlib.import_module(module).main()
    (parser,) = caught.value.args
    return {option: action.default for action in parser._actions for option in action.option_strings}


def named_defaults(docstring: str) -> dict[str, list[str]]:
    """The options in brackets of the usage, with their values."""
    usage = re.search(r"^    python .*(\n {8,}.*)*", docstring, re.MULTILINE)
    brackets = re.findall(r"\[([^]]*)\]", usage.group()) if usage else []
    options = [part.split() for text in brackets for part in re.split(r" (?=--)", text)]
    return {name: values for name, *values in options}


def is_default(values: list[str], default: object) -> bool:
    if not values:
        return default is False
    if all(PLACEHOLDER.fullmatch(value) for value in values):
        return default is None
    known = [str(value) for value in (default if isinstance(default, list) else [default])]
    if "…" in values:
        return values[0] == known[0] and values[-1] == known[-1]
    return values == known


def test_there_are_benches():
    assert {"bench.frozen", "bench.memories", "bench.peers.training"} <= set(BENCHES)


@pytest.mark.parametrize("module", BENCHES)
def test_the_usage_names_the_defaults_of_the_parser(module, monkeypatch):
    defaults = defaults_of(module, monkeypatch)
    for option, values in named_defaults(importlib.import_module(module).__doc__).items():
        assert is_default(values, defaults[option]), f"{module}: {option} {values}, and {defaults[option]!r}"
