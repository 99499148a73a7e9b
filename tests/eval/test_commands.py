"""Guards the commands of `sink-eval`: quick to start, one question at a time, and imports that a reader can find."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from eval.cli import COMMANDS

EVAL = Path(__file__).resolve().parents[2] / "eval"
HEAVY = {"torch", "transformers", "numpy", "scipy", "rich", "matplotlib", "lm_eval", "datasets"}


def loaded_by(program: str) -> set[str]:
    """The names of the modules that are loaded once a program has run."""
    program = f"import sys\n{program}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_commands_import_nothing_heavy():
    """Risk: seconds before --help, or before a mistyped option is reported."""
    loaded = loaded_by("".join(f"import eval.commands.{name}\n" for name in COMMANDS))
    assert {f"eval.commands.{name}" for name in COMMANDS} <= loaded
    assert not loaded & HEAVY


def test_a_question_imports_no_other_question():
    """Risk: a package that only another question needs is imported, or has to be installed."""
    options = "['ppl', '--model', 'none', '--text', '/none.txt']"
    loaded = loaded_by(f"from eval.cli import main\nassert main({options}) == 2")
    assert {name for name in loaded if name.startswith("eval.commands.")} == {
        f"eval.commands.{name}" for name in ("ppl", "options", "checks", "output", "tables")
    }
    measure = loaded_by("import eval.measures.perplexity")
    shared = {"perplexity", "loading", "meters", "statistics", "texts"}
    assert {name for name in measure if name.startswith("eval.measures.")} == {f"eval.measures.{x}" for x in shared}
    assert not {name for name in measure if name.startswith(("eval.commands", "eval.report"))}


def imports_in_functions(path: Path) -> list[tuple[str, str]]:
    """For each import inside a function: the function's name and the module."""
    found = []
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    found += [(function.name, alias.name) for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    found.append((function.name, str(node.module)))
    return found


@pytest.mark.parametrize("room", ["measures", "policies"])
def test_measures_import_at_the_top(room):
    for path in sorted((EVAL / room).rglob("*.py")):
        assert imports_in_functions(path) == [], path


def test_a_command_loads_its_measure_in_run():
    """One obvious place: `run`, after the checks. Elsewhere `tables` imports only rich, and `output` only one module.

    That is the library of products, which a result records; by then the measure has loaded torch.
    """
    for path in sorted((EVAL / "commands").glob("*.py")):
        for function, module in imports_in_functions(path):
            if path.stem == "tables":
                assert module.split(".")[0] == "rich"
            elif path.stem == "output":
                assert module == "sinkmodel.products"
            else:
                assert function == "run", path
                assert module.startswith(("eval.measures", "eval.report")), path


def test_measures_know_nothing_of_commands():
    for path in sorted((EVAL / "measures").rglob("*.py")):
        assert "eval.commands" not in "".join(
            line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(("from", "import"))
        ), path
