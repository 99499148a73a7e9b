"""Guards: prose that an engineer understands at first reading. CONTRIBUTING has the rules; these can be counted."""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("sinkmodel", "recipes", "eval")
SCRIPTS = ("bench", "examples", "docs", "slurm")
# Tests whose comments and names are not in plain English yet.
TO_DO = ("tests/bench", "tests/sinkmodel/memories", "tests/eval/test_memories.py", "tests/recipes/test_start_from.py")
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in ("runs", "build") for part in path.relative_to(ROOT).parts)
)
# What is neither Python nor a page. Users read the messages of scripts and the text of templates as well.
OTHER = sorted(
    path
    for pattern in (
        "Makefile",
        "pyproject.toml",
        ".ci/run",
        "*/**/*.sh",
        "*/**/*.sbatch",
        "*/**/*.jinja*",
        "*/**/*.yaml",
    )
    for path in ROOT.glob(pattern)
    if not any(part.startswith(".v") or part in ("runs", "build") for part in path.relative_to(ROOT).parts)
)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"`[^`]*`|\"[^\"]*\"|“[^”]*”")  # names of code, and words that are spoken of

# What only we used, and the words that the field has for it.
DIALECT = {
    r"(?<!leave )(?<!leaves )(?<!left )(?<!fall )(?<!falls )behind": "after",
    r"anew": "again, from the start",
    r"(?:go|goes|going|went) on(?! top)": "continue, resume",
    r"said(?! to be)|told|tells": "print, report, log, name",
    r"hears?|heard": "receive, learn",
    r"stands": "is",
}


@functools.cache
def prose_of(source: str) -> str:
    """The docstrings and comments of a file."""
    tree = ast.parse(source)
    described = (node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)))
    texts = [ast.get_docstring(node) or "" for node in described]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join([*texts, *(token.string for token in tokens if token.type == tokenize.COMMENT)])


@functools.cache
def messages_of(source: str) -> str:
    """The string literals of a file: messages, help, log lines. Docstrings are in `prose_of`."""
    tree = ast.parse(source)
    # A docstring, or another string that is a statement by itself.
    described = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in described)
    return "\n".join(node.value for node in strings if isinstance(node.value, str))


def page_of(path: Path) -> str:
    """The text of a page, without code, and without the section that lists the words."""
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    return re.sub(r"^## Plain English\n.*?(?=^## )", "", text, flags=re.MULTILINE | re.DOTALL)


def count(word: str, text: str) -> int:
    return len(re.findall(rf"\b{word}\b", text, re.IGNORECASE))


def dialect_in(text: str) -> list[str]:
    """Each use of a word of DIALECT, with what is around it and a better word."""
    plain = QUOTED.sub("…", " ".join(text.split()))
    return [
        f"…{plain[max(0, found.start() - 30) : found.end() + 30]}…: write {better}"
        for word, better in DIALECT.items()
        for found in re.finditer(rf"\b(?:{word})\b", plain, re.IGNORECASE)
    ]


def stored_names(source: str) -> set[str]:
    """Variables, parameters, and attributes of self that a file assigns."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


def sources(room: str) -> dict[str, str]:
    """The files of a folder, without those of TO_DO, and without this one, which names the words."""
    files = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / room).rglob("*.py"))}
    skipped = (*TO_DO, "tests/test_plain_english.py")
    return {name: path.read_text(encoding="utf-8") for name, path in files.items() if not name.startswith(skipped)}


@pytest.mark.parametrize("room", ROOMS)
def test_a_condition_begins_with_if(room):
    """Risk: "where" takes the place of "if" again. Other projects of the field write it a third to a sixth as often."""
    text = "\n".join(f"{prose_of(source)}\n{messages_of(source)}" for source in sources(room).values())
    assert count("if", text) > 50, "the text is not read at all"
    assert count("where", text) <= count("if", text) / 3


def test_a_condition_in_a_script_begins_with_if():
    """Risk: the same in the programs around the packages."""
    files = [source for room in SCRIPTS for source in sources(room).values()]
    text = "\n".join(f"{prose_of(source)}\n{messages_of(source)}" for source in files)
    assert count("if", text) > 20, "the text is not read at all"
    assert count("where", text) <= count("if", text) / 3


def test_a_condition_in_a_test_begins_with_if():
    """Risk: the same in the docstrings and comments of tests."""
    text = "\n".join(prose_of(source) for source in sources("tests").values())
    assert count("if", text) > 40, "the text is not read at all"
    assert count("where", text) <= count("if", text) / 3


def test_a_condition_on_a_page_begins_with_if():
    """Risk: the same on the pages: "where" a third as often on all of them, and on none half as often."""
    pages = {str(page.relative_to(ROOT)): page_of(page) for page in PAGES}
    text = "\n".join(pages.values())
    assert count("where", text) <= count("if", text) / 3
    often = [
        name
        for name, text in pages.items()
        if count("where", text) > max(3, (count("if", text) + count("when", text)) / 2)
    ]
    assert not often


@pytest.mark.parametrize("room", [*ROOMS, *SCRIPTS])
def test_no_file_uses_a_word_that_only_we_used(room):
    """Risk: a private dialect, which taxes every reader: in docstrings and comments, messages and help."""
    files = sources(room)
    assert files
    found = {file: dialect_in(prose_of(source)) + dialect_in(messages_of(source)) for file, source in files.items()}
    assert not {file: uses for file, uses in found.items() if uses}


def test_no_test_uses_a_word_that_only_we_used():
    """Risk: the same in the docstrings and comments of tests. Their strings are also texts for models."""
    found = {file: dialect_in(prose_of(source)) for file, source in sources("tests").items()}
    assert not {file: uses for file, uses in found.items() if uses}


@pytest.mark.parametrize("path", [*PAGES, *OTHER], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_page_uses_a_word_that_only_we_used(path):
    """Risk: the same on a page, in a template, and in a script."""
    assert not dialect_in(page_of(path))


@pytest.mark.parametrize("room", [*ROOMS, *SCRIPTS, "tests"])
def test_variables_are_named_for_what_they_hold(room):
    """Risk: `said` and `told` were the names of ten kinds of things."""
    found = {
        file: stored_names(source) & {"said", "told", "tells", "says", "heard"}
        for file, source in sources(room).items()
    }
    assert not {file: names for file, names in found.items() if names}


def test_the_words_are_found():
    """Risk: the tests above pass because they find nothing."""
    source = '''"""It goes on behind the lock."""\ndef f(told):\n    self.said = 1  # made anew\n'''
    assert len(dialect_in(prose_of(source))) == 3
    message = '''def f(n):\n    """It starts."""\n    raise E(f"{n} goes on", help="begins anew")\n'''
    assert len(dialect_in(messages_of(message))) == 2
    assert not dialect_in(messages_of('"""A module, made anew."""'))
    names = {str(path.relative_to(ROOT)) for path in OTHER}
    assert names >= {"Makefile", "pyproject.toml", "slurm/job.sh", "recipes/card/templates/card.md.jinja"}
    assert stored_names(source) == {"told", "said"}
    assert not dialect_in('`told` and "said" are quoted; links that git leaves behind; it falls behind; goes on top')
