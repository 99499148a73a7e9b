"""Guards: imports run downward only, and the library does not pull in the training stack."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "sinkmodel": {"recipes", "eval", "lightning", "deepspeed", "wandb", "datasets", "jsonargparse"},
    "recipes": {"eval"},
    "eval": {"recipes", "lightning", "deepspeed", "wandb"},
}


def imported(path: Path) -> set[str]:
    """Top-level names of every import in a file, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_run_downward_only(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert len(files) >= 8
    for path in files:
        assert not imported(path) & FORBIDDEN[room], path


def test_examples_run_from_a_clone_with_the_packages_installed():
    """Risk: a script imports `examples` or `tests`, which are not in the wheel, and runs only for developers."""
    for path in sorted((ROOT / "examples").glob("*.py")):
        assert not imported(path) & {"examples", "tests", "bench"}, path


def test_measurements_use_nothing_of_the_tests():
    """Risk: a benchmark or an example runs only for developers, and changes with a test's helper."""
    files = sorted(path for room in ("bench", "examples", "docs", "slurm") for path in (ROOT / room).rglob("*.py"))
    assert len(files) >= 20
    for path in files:
        assert "tests" not in imported(path), path


LONGEST_FILE, LONGEST_FUNCTION = 400, 60  # lines


def long_functions(source: str) -> list[str]:
    functions = (x for x in ast.walk(ast.parse(source)) if isinstance(x, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return [f.name for f in functions if f.end_lineno - f.lineno + 1 > LONGEST_FUNCTION]


def test_files_and_functions_stay_short():
    """Risk: a file or a function that no reader can keep in mind."""
    for path in sorted(
        path for room in (*FORBIDDEN, "bench", "examples", "slurm", "docs") for path in (ROOT / room).rglob("*.py")
    ):
        source = path.read_text(encoding="utf-8")
        assert source.count("\n") <= LONGEST_FILE, path
        assert not long_functions(source), path
    assert long_functions("def f():\n" + "    pass\n" * LONGEST_FUNCTION) == ["f"]


def test_every_module_says_first_what_it_is_for():
    for room in FORBIDDEN:
        for path in sorted((ROOT / room).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            assert not text.strip() or ast.get_docstring(ast.parse(text)), path


COMMANDS = [
    "sink-log",
    *("sink-prepare", "sink-pretrain", "sink-export", "sink-push", "sink-stream"),
    *(
        "sink-eval ppl",
        "sink-eval latency",
        "sink-eval verify",
        "sink-eval grid",
        "sink-eval sinks",
        "sink-eval streameval",
        "sink-eval longcontext",
        "sink-eval zeroshot",
    ),
    "sink-evolve",
    "sink-eval report",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command):
    script, *rest = command.split()
    ascii_terminal = {**os.environ, "PYTHONIOENCODING": "ascii"}
    call = [Path(sys.executable).with_name(script), *rest, "--help"]
    done = subprocess.run(call, capture_output=True, text=True, env=ascii_terminal)
    assert done.returncode == 0, done.stderr
    assert f"{command} --" in done.stdout.split("xample", 1)[1]


@pytest.mark.parametrize(
    ("module", "argv", "package", "extra"),
    [
        ("recipes.prepare", ["--help"], "jsonargparse", "train"),
        ("recipes.pretrain", ["--help"], "yaml", "train"),
        ("recipes.pretrain", ["--output=x", "--data.path=x"], "lightning", "train"),
        ("recipes.evolve", ["--model=x", "--output=x"], "cmaes", "evolve"),
        ("recipes.publish", ["--model", ".", "--repo", "me/x"], "huggingface_hub", "hub"),
        ("eval.cli", ["report", "--json", "x.json", "--output", "y"], "matplotlib", "plots"),
        ("eval.cli", ["zeroshot", "--model", "x", "--tasks", "piqa"], "lm_eval", "zeroshot"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(tmp_path, module, argv, package, extra):
    row = '{"policy": "sink", "sinks": 1, "window": 1, "by_position": []}'
    (tmp_path / "x.json").write_text(f'{{"command": "ppl", "model": "m", "budget": 1, "rows": [{row}]}}')
    program = f"import sys; sys.modules[{package!r}] = None; from {module} import main; sys.exit(main({argv!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"the package {package} is not installed" in done.stderr.splitlines()[-1]
    assert f"sinkmodel[{extra}]" in done.stderr
    assert "Traceback" not in done.stderr


OPENS, NOT_FILES = {"open", "read_text", "write_text", "fdopen"}, {"os", "Image", "split", "tarfile"}


def unnamed_encodings(path: Path) -> list[int]:
    """Lines on which a text file, or a pipe as text, is opened without naming its encoding."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        of = getattr(node.func.value, "id", "") if isinstance(node.func, ast.Attribute) else ""
        modes = [
            word.value for word in ast.walk(node) if isinstance(word, ast.Constant) and isinstance(word.value, str)
        ]
        as_text = any(word.arg in ("text", "universal_newlines") for word in node.keywords) and of == "subprocess"
        binary = any("b" in mode and len(mode) <= 3 for mode in modes)
        if as_text or (called in OPENS and of not in NOT_FILES and not binary):
            lines.append(node.lineno)
    return lines


def test_every_text_file_names_its_encoding():
    """In a locale without UTF-8, and on Windows, Python would read and write ours in another one."""
    folders = [*FORBIDDEN, "slurm", "examples", "docs", "bench"]
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        assert not unnamed_encodings(path), path


def test_preparing_text_imports_no_model_code():
    """Risk: each worker of `sink-prepare` imports transformers or torch, a second or more before its first text."""
    program = (
        "import sys, recipes.data.preparation; print(*({'torch', 'transformers', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def ours(path: Path) -> tuple[set[str], set[str]]:
    """The modules of our packages that a file imports when it is imported, and all that it imports at any time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))

    def named(nodes) -> set[str]:
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module:
                parts = {f"{node.module}.{alias.name}" for alias in node.names}
                modules = {name for name in parts if file_of(name).exists()}
                names |= modules if modules == parts else {*modules, node.module}
        return {name for name in names if name.split(".")[0] in FORBIDDEN and file_of(name).exists()}

    return named(tree.body), named(list(ast.walk(tree)))


def file_of(module: str) -> Path:
    """The file of a module; `__init__.py` if it is a package."""
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_no_two_modules_need_each_other():
    """Risk: a circle of imports, also one that is hidden in a function: neither part can be read alone."""
    needs = {
        path: {file_of(name) for name in ours(path)[1]} for room in FORBIDDEN for path in (ROOT / room).rglob("*.py")
    }
    assert all(needs[file_of(name)] for name in ("recipes.publish", "sinkmodel.streaming")), "no imports are read"
    while needs:
        free = {path for path, wanted in needs.items() if not wanted & set(needs)}
        assert free, sorted(str(path.relative_to(ROOT)) for path in needs)
        needs = {path: wanted for path, wanted in needs.items() if path not in free}


def test_the_cache_is_read_from_top_to_bottom():
    """Risk: the cache, its forward and its state grow into one again: imports that run up, or wait in a function."""
    floors = [["cache"], ["forward"], ["state"], ["layer", "serialization"], ["plan", "inputs", "hook", "sizes"]]
    folder = ROOT / "sinkmodel" / "cache"
    assert {path.stem for path in folder.glob("*.py")} == {"__init__", *(name for floor in floors for name in floor)}
    for place, floor in enumerate(floors):
        below = {f"sinkmodel.cache.{name}" for names in floors[place + 1 :] for name in names}
        for name in floor:
            at_once, ever = ours(folder / f"{name}.py")
            within = {module for module in ever if module.startswith("sinkmodel.cache")}
            assert within <= below, name
            assert within <= at_once, name


def test_sinks_in_the_softmax_stay_in_their_package():
    """Risk: their cases spread over the library again, and a reader of the sink token must read them too."""
    package = "sinkmodel.softmax_sinks"
    users = {
        path.relative_to(ROOT).as_posix()
        for room in ("sinkmodel", "recipes")
        for path in (ROOT / room).rglob("*.py")
        if any(name.startswith(package) for name in ours(path)[1]) and "softmax_sinks" not in path.parts
    }
    attention = {"attention.py", "attention_maps.py", "band.py", "memories/observation.py"}
    assert users == {
        *(f"sinkmodel/{name}" for name in (*attention, "architectures.py", "models.py")),
        "recipes/training/optimizer.py",
    }


def test_nothing_of_a_cache_is_written_from_outside():
    """Risk: an invariant of the state that another file can break."""
    for path in sorted((ROOT / "sinkmodel").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Attribute) and isinstance(target.value, (ast.Name, ast.Attribute)):
                    owner = target.value.id if isinstance(target.value, ast.Name) else target.value.attr
                    assert owner not in ("cache", "state"), f"{path.name}:{node.lineno}"
