"""Guards: a page of the project never names a file, a section, a command or an option that is not there."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from sinkmodel.results.files import write_result
from sinkmodel.results.perplexity import PerplexityResult, PerplexityRow

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in ("runs", "build") for part in path.relative_to(ROOT).parts)
)
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"--[a-z][\w.-]*")
OTHERS = {"--no-deps", "--constraint", "--logdir"}  # pip's, tensorboard's


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def script(path: str):
    """A file that is no module of ours, as one."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------------------------- pages


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_within_the_project_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(file), f"{page}: {link}"


def test_links_and_sections_are_found_at_all():
    """Guards the test above against passing on nothing."""
    assert len(PAGES) >= 8
    assert "(eval/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"add-a-policy", "zeroshot-tasks-of-lm-eval"} <= anchors(ROOT / "eval" / "README.md")


@functools.lru_cache
def options_of(command: str) -> frozenset[str]:
    """What `--help` of `sink-x` or `sink-eval question` lists, in this process: a dozen of them are asked."""
    name, *rest = command.split()
    module, _, function = SCRIPTS[name].partition(":")
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        getattr(importlib.import_module(module), function)([*rest, "--help"])
    return frozenset(OPTION.findall(output.getvalue()))


def test_a_flag_has_hyphens_and_only_a_dotted_key_has_underscores():
    """Risk: `--vocabulary_size` beside `--max-tokens` again (DESIGN.md, "Flags have hyphens")."""
    questions = [f"sink-eval {name}" for name in importlib.import_module("eval.cli").COMMANDS]
    for command in (*SCRIPTS, *questions):
        options = options_of(command)
        assert not {option for option in options if "_" in option and "." not in option}, command
        assert not {option for option in options if "-" in option[2:].strip("-.") and "." in option.strip(".")}, command


def commands_on(page: Path) -> list[tuple[str, list[str]]]:
    """(`sink-x` or `sink-eval question`, its words) of each command in the code blocks of a page."""
    found = []
    for language, block in FENCED.findall(page.read_text(encoding="utf-8")):
        if language:
            continue
        for line in re.sub(r" *\\\n *", " ", block).splitlines():
            for part in re.sub(r"(^|\s)#.*", "", line).split("|"):
                if part.split()[:1] and part.split()[0] in SCRIPTS:
                    words = shlex.split(part)
                    several = words[0] == "sink-eval" and len(words) > 1
                    found.append((" ".join(words[: 1 + several]), words[1 + several :]))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_on_a_page_has_the_options_that_it_is_given(page):
    for command, words in commands_on(page):
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= options_of(command), f"{page}: {command} {' '.join(words)}"


def test_commands_are_found_at_all():
    """Guards the test above against passing on nothing."""
    found = {command for page in PAGES for command, _ in commands_on(page)}
    assert {f"sink-eval {name}" for name in importlib.import_module("eval.cli").COMMANDS} <= found
    assert set(SCRIPTS) - {"sink-eval"} <= found
    assert "--budget" in options_of("sink-eval ppl")
    assert "--optimizer.lr" in options_of("sink-pretrain")


@pytest.mark.parametrize("room", ["", "recipes", "sinkmodel", "eval", "configs"])
def test_every_option_in_the_prose_is_one_of_a_command(room):
    text = FENCED.sub("", (ROOT / room / "README.md").read_text(encoding="utf-8"))
    named = {option for code in re.findall(r"`([^`]+)`", text) for option in OPTION.findall(code)}
    known = {option for page in PAGES for command, _ in commands_on(page) for option in options_of(command)}
    assert {option.rstrip(".-") for option in named} <= known | OTHERS


def test_every_key_of_a_config_is_explained_by_help():
    """Needs docstring-parser, without which jsonargparse shows names and types alone."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        importlib.import_module("recipes.pretrain").main(["--help"])
    assert "the run folder; if it holds a run that stopped, that run is resumed" in " ".join(output.getvalue().split())


def tour() -> list[tuple[str, list[str]]]:
    """(file, names that it should define) of the codebase tour. A step may go through two files."""
    _, _, page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## A tour of the code")
    page, _, _ = page.partition("\n## ")
    steps = re.split(r"`([\w/]+\.py)`: ", "\n".join(re.findall(r"^\d+\. (?:.*\n)(?:    ?.*\n)*", page, re.MULTILINE)))
    return [(file, re.findall(r"`(\w+)`", text)) for file, text in zip(steps[1::2], steps[2::2])]


def test_the_tour_of_the_code_names_what_is_there():
    """Risk: a newcomer looks for a function that was renamed."""
    assert len(tour()) >= 20
    for file, names in tour():
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert names, file
        assert names[0] in defined, f"{file} has no {names[0]}"


def test_code_cites_decisions_that_are_there():
    """Risk: a comment that cites a decision which has got another heading."""
    _, _, design = (ROOT / "DESIGN.md").read_text(encoding="utf-8").partition("## Decisions")
    headings = set(re.findall(r"^##+ (.*)$", design, re.MULTILINE))
    cited = set()
    for path in sorted(
        path for folder in ("sinkmodel", "recipes", "eval", "bench", "tests") for path in (ROOT / folder).rglob("*.py")
    ):
        text = " ".join(path.read_text(encoding="utf-8").split())
        assert not re.search(r"design, decisions? \d", text), f"{path}: cite the heading of the decision"
        here = set(re.findall(r'DESIGN\.md, "([^"]+)"', text))
        assert here <= headings, path
        cited |= here
    assert len(cited) >= 8


# ------------------------------------------------------------------------------------------------------------- pictures


def demo_result(policies: list[tuple[str, int]], bins: list[tuple[int, int, float]]) -> PerplexityResult:
    losses = dict.fromkeys(("tokens", "nll", "nll_after_overflow", "stderr_after_overflow"))
    rows = [PerplexityRow(policy=name, sinks=s, window=None, **losses, by_position=bins) for name, s in policies]
    return PerplexityResult(model="m", budget=256, rows=rows)


def test_the_picture_of_the_readme_is_made_from_the_results_of_the_demo(tmp_path):
    picture = script("docs/picture.py")
    policies = [("dense", 0), ("window", 0), ("sink", 1), ("sink", 4)]
    for name, level in (("smollm2", 2.0), ("smollm2-sink", 1.9), ("vanilla", 4.0), ("sink", 4.1)):
        bins = [(32 * i, 32 * i + 31, level + 0.1 * (i % 3)) for i in range(16)]
        write_result(tmp_path / f"{name}.json", demo_result(policies, bins))
    picture.main(tmp_path, tmp_path / "one.svg")
    picture.main(tmp_path, tmp_path / "two.svg")
    made = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert made == (tmp_path / "two.svg").read_text(encoding="utf-8"), "the same numbers, the same bytes"
    shipped = (ROOT / "docs" / "streams.svg").read_text(encoding="utf-8")
    for svg in (made, shipped):
        assert len(svg) < 100_000
        assert svg.startswith("<svg")
        assert "prefers-color-scheme: dark" in svg
        assert all(
            label in svg for label in ("0+256", "trained sink 1+255", "sink model 1+127", "vanilla 0+128", 'role="img"')
        )


def test_bins_of_a_picture_are_means_of_losses_and_not_of_perplexities():
    result = demo_result([("sink", 1)], [(0, 1, 1.0), (2, 3, 3.0), (4, 5, 2.0)])
    points = script("docs/picture.py").line_of(result, "sink", 1)
    assert points == [(1.5, pytest.approx(2.718281828**2)), (4.5, pytest.approx(2.718281828**2))]


# ------------------------------------------------------------------------------------------------------------ reference


def test_the_reference_finds_names_and_links_that_lead_nowhere(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "a.html").write_text('<p id="here"></p> <code>sinkmodel.gone</code> <code>torch.nn</code>')
    (tmp_path / "index.html").write_text(
        '<a href="eval/a.html#here">1</a> <a href="eval/a.html#there">2</a> <a href="b.html">3</a>'
        '<code><a href="eval/a.html">eval.a</a></code>'
    )
    dead = script("docs/reference.py").dead_ends(tmp_path)
    assert dead == [("eval/a.html", "sinkmodel.gone"), ("index.html", "eval/a.html#there"), ("index.html", "b.html")]


@pytest.mark.slow
def test_the_reference_is_made_of_all_docstrings_without_a_warning(tmp_path):
    build = [sys.executable, ROOT / "docs" / "reference.py", tmp_path / "docs"]
    done = subprocess.run(build, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stderr, "all that is written there is a warning"
    cache = (tmp_path / "docs" / "sinkmodel" / "cache" / "cache.html").read_text(encoding="utf-8")
    assert "slots of a KV head" in cache
    assert "convention" in cache
