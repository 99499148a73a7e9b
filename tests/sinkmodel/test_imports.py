"""Guards: importing without the garbage collector leaves it on, and leaves other programs' objects alone."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
from pathlib import Path

import pytest

from sinkmodel.imports import slow_imports

ROOT = Path(__file__).resolve().parents[2]


def run(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_collector_is_off_in_the_block_and_skips_what_was_imported_afterwards():
    program = (
        "import gc\nfrom sinkmodel.imports import slow_imports\n"
        "with slow_imports():\n    print(gc.isenabled())\n    import json.tool\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 1000)"
    )
    assert run(program) == ["False", "True", "True"]


def test_a_failed_import_leaves_the_collector_on():
    program = (
        "import gc\nfrom sinkmodel.imports import slow_imports\n"
        "try:\n    with slow_imports():\n        import no_such_package\n"
        "except ModuleNotFoundError:\n    print(gc.isenabled())"
    )
    assert run(program) == ["True"]


def test_a_program_that_has_imported_transformers_keeps_its_collector():
    """Risk: garbage of a program that calls our commands is frozen, and never freed."""
    import transformers  # noqa: F401

    before = gc.get_freeze_count()
    with slow_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_a_collector_that_is_off_stays_off():
    program = (
        "import gc\ngc.disable()\nfrom sinkmodel.imports import slow_imports\n"
        "with slow_imports():\n    pass\nprint(gc.isenabled(), gc.get_freeze_count())"
    )
    assert run(program) == ["False", "0"]


COMMANDS = {
    "recipes/pretrain.py": ["recipes.training.run", "recipes.training.dry_run"],
    "recipes/evolve.py": ["recipes.evolution.run"],
    "sinkmodel/export/command.py": ["sinkmodel.export.folder", "sinkmodel.export.gguf_file", "sinkmodel.export.row"],
    "sinkmodel/streaming/command.py": ["sinkmodel.loading"],
    "eval/measures/command.py": ["sinkmodel.loading"],
}


@pytest.mark.parametrize("file", COMMANDS)
def test_commands_import_what_is_slow_in_the_block(file):
    """Risk: a command takes a quarter more CPU time before its first line, and nobody notices."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        and any(getattr(getattr(item.context_expr, "func", None), "id", "") == "slow_imports" for item in node.items)
    ]
    inside = {line.module for block in blocks for line in ast.walk(block) if isinstance(line, ast.ImportFrom)}
    assert set(COMMANDS[file]) <= inside
