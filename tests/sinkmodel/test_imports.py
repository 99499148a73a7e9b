"""Guards: importing without the garbage collector leaves it on, and leaves other programs' objects alone."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
from pathlib import Path

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
    "recipes/pretrain.py": "recipes.training.",
    "recipes/evolve.py": "recipes.evolution.run",
    "sinkmodel/export/command.py": "sinkmodel.export.",
    "sinkmodel/streaming/command.py": "sinkmodel.loading",
    **{str(path.relative_to(ROOT)): "eval.measures" for path in sorted((ROOT / "eval" / "commands").glob("*.py"))},
}
LIGHT = {  # imported in the functions that use them, but they import neither torch nor transformers
    "recipes.training.settings",
    "recipes.training.processes.ranks",  # torch alone, in a run of several processes
}


def lines_in(nodes: list[ast.AST], prefix: str) -> list[str]:
    lines = [line for node in nodes for line in ast.walk(node) if isinstance(line, ast.ImportFrom)]
    return sorted(x.module for x in lines if x.module and x.module.startswith(prefix) and x.module not in LIGHT)


def test_commands_import_what_is_slow_in_the_block():
    """Risk: a command takes a quarter more CPU time before its first line, and nobody notices."""
    found = []
    for file, prefix in COMMANDS.items():
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        blocks = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.With)
            and any(
                getattr(getattr(item.context_expr, "func", None), "id", "") == "slow_imports" for item in node.items
            )
        ]
        assert lines_in(functions, prefix) == lines_in(blocks, prefix), file
        found += lines_in(blocks, prefix)
    assert len(found) > 15
