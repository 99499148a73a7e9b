"""Guards: an upgrade that takes a private part of another package away fails here, with its name, and not in a run."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest

from tests.private_parts import PRIVATE_PARTS, READ_IN
from tests.private_parts.__main__ import page
from tests.private_parts.checks import operator, sets, takes
from tests.private_parts.part import PrivatePart, resolve

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("sinkmodel", "recipes", "eval")
SCANNED = (*ROOMS, "bench", "examples", "docs", "slurm")
DOCUMENTED = {"os._exit"}  # a leading underscore, and a promise all the same
# Strings of this form that are not names of others: the ends of other names.
SUFFIXES = {"_e", "_stderr", "_difference", "_low", "_high", "_inv_freq"}


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def files() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for room in SCANNED for path in (ROOT / room).rglob("*.py"))


@functools.cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def defined_in(tree: ast.AST) -> set[str]:
    """Private names that a file gives to something of its own: functions, classes, variables, attributes of self."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            names.add(node.arg)
    return {name for name in names if is_private(name)}


def is_self(node: ast.AST) -> bool:
    called_super = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    return called_super or (isinstance(node, ast.Name) and node.id in ("self", "cls"))


def foreign_names(tree: ast.AST, everywhere: set[str], listed: set[str]) -> set[str]:
    """Private names of others that a file uses.

    Args:
        everywhere: private names that any of our files defines; `self._x` may be one of a base class of ours.
        listed: names that are in the table. They count as foreign, even if we define them, as an override does.
    """
    here, found = defined_in(tree) - listed, set()
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node) not in DOCUMENTED:
            ours = here | (everywhere - listed if is_self(node.value) else set())
            found |= {node.attr} - ours
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if not modules or modules[0].partition(".")[0] not in SCANNED:
                words = ".".join([*modules, *(alias.name for alias in node.names)]).split(".")
                found |= {word for word in words if is_private(word)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            found |= {name for name in {node.value} - here - SUFFIXES if is_private(name)}
        elif isinstance(node, ast.FunctionDef) and node.name in listed:
            found.add(node.name)
    return found


def patched_in(tree: ast.AST) -> set[str]:
    """Attributes of imported packages that a file assigns."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    stores = (node for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.Subscript)))
    targets = (ast.unparse(node) for node in stores if isinstance(node.ctx, ast.Store))
    return {target for target in targets if words(target)[0] in imported and not target.startswith("os.environ")}


def words(target: str) -> list[str]:
    return re.split(r"\W+", target)


LISTED = {word for part in PRIVATE_PARTS for word in part.name.split(".") if is_private(word)}


@functools.cache
def used() -> dict[str, set[str]]:
    """For each file the private names of others that it uses. Scripts may use private names of our packages."""
    own = private_names() - LISTED
    names = {file: foreign_names(tree_of(file), private_names(), LISTED) for file in files()}
    return {file: found if file.startswith(ROOMS) else found - own for file, found in names.items()}


@functools.cache
def private_names() -> set[str]:
    """Private names that any of our files defines."""
    return {name for file in files() for name in defined_in(tree_of(file))}


@pytest.mark.parametrize("part", PRIVATE_PARTS, ids=lambda part: part.name)
def test_the_installed_package_has_it(part: PrivatePart):
    """Risk: an upgrade takes it away, and the first run that needs it ends with an AttributeError."""
    assert part.exists(), f"{part.package} has changed {part.name}, which {', '.join(part.files)} need: {part.why}"


@pytest.mark.parametrize("package", READ_IN)
def test_the_table_was_read_in_the_installed_version(package):
    """Risk: a private part keeps its name and changes its meaning, and nobody has looked."""
    if package == "python":
        installed = ".".join(map(str, sys.version_info[:2]))
    else:
        installed = importlib.metadata.version(package).partition("+")[0]
    assert installed == READ_IN[package], f"{package} is {installed}: read its parts again, then change READ_IN"
    assert any(part.package == package for part in PRIVATE_PARTS), f"no part of {package} is used any more"


def test_every_private_name_of_others_is_in_the_table():
    """Risk: the table rots, and an upgrader does not know which code to read."""
    known = {(file, word) for part in PRIVATE_PARTS for file in part.files for word in part.name.split(".")}
    missing = [(file, name) for file, names in used().items() for name in sorted(names) if (file, name) not in known]
    assert not missing, "add these to tests/private_parts"


@pytest.mark.parametrize("part", PRIVATE_PARTS, ids=lambda part: part.name)
def test_every_file_of_the_table_uses_the_name(part: PrivatePart):
    """Risk: an upgrader reads about a part that is not used any more."""
    name = part.name.rpartition(".")[2]
    for file in part.files:
        if is_private(name):
            assert name in used()[file], f"{file} does not use {name} any more; take it out of the table"
        else:
            assert re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8")), f"{file}: {name}"


def test_every_replaced_part_is_in_the_table():
    """Risk: a monkeypatch that nobody knows of."""
    known = {(file, part.name.rpartition(".")[2]) for part in PRIVATE_PARTS if part.patched for file in part.files}
    replaced = [(file, target) for file in files() for target in patched_in(tree_of(file))]
    missing = [(file, target) for file, target in replaced if not {(file, word) for word in words(target)} & known]
    assert not missing, "add these to tests/private_parts"


def test_every_private_method_that_we_override_is_in_the_table():
    """Risk: a private name of ours takes the place of a base class's method of the same name, by accident."""
    for package in map(__import__, ROOMS):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            for ours in vars(resolve(module.name)).values():
                if inspect.isclass(ours) and ours.__module__ == module.name:
                    for name in overridden(ours) - LISTED:
                        raise AssertionError(f"{module.name}.{ours.__qualname__} overrides {name}")


def overridden(ours: type) -> set[str]:
    """Private names that a class of ours, or a base of ours, puts before one of a base class of others."""
    own = [each for each in ours.__mro__ if each.__module__.partition(".")[0] in ROOMS]
    # What no file of ours writes was put into the class by others: by a metaclass, or by transformers, which keeps
    # answers there.
    names = {name for each in own for name in vars(each)} & private_names()
    others = [each for each in ours.__mro__ if each not in own]
    return {name for name in names if any(name in vars(each) for each in others)}


def test_the_page_is_the_table():
    """Risk: the page shows a table that is not the one which is checked."""
    shipped = (ROOT / "docs" / "private_parts.md").read_text(encoding="utf-8")
    assert shipped == page(), "make it with: python -m tests.private_parts > docs/private_parts.md"


def test_the_scanner_finds_each_way_to_use_a_private_name():
    """Risk: the tests above pass because they find nothing."""
    program = """
import torch
from torch._thing import one
from torch.thing import _two
_three = 3
class C(B):
    _four = 4
    def f(self, model):
        self._five = model._six + self._seven + self._four + torch._eight + _three + C._four
        getattr(model, "_nine")
        torch.patched.x = torch.table["y"] = 1
"""
    tree = ast.parse(program)
    found = foreign_names(tree, {"_seven"}, set())
    assert found == {"_thing", "_two", "_six", "_eight", "_nine"}
    assert "_four" in foreign_names(tree, set(), {"_four"}), "what is listed counts even if we define it"
    assert patched_in(tree) == {"torch.patched.x", "torch.table['y']"}
    assert patched_in(ast.parse("import a.b\na.b['y'] = 1")) == {"a.b['y']"}


def test_the_checks_of_the_table_can_fail():
    """Risk: a check that is true of anything."""
    assert not takes("argparse.HelpFormatter._fill_text", "texts")()
    assert not sets("argparse.ArgumentParser", "no_such_attribute")()
    assert not operator("aten.mm", "self", "mat3")()
    with pytest.raises(AttributeError, match="no_such"):
        PrivatePart("python", "argparse.no_such", (), "").exists()
