"""Make the API reference from docstrings, as pages in a folder: `make docs`.

    python docs/reference.py build/docs

If pdoc warns, or if a name of ours has no target, the exit code is 1.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import sys
import warnings
from pathlib import Path

import pdoc
from pdoc import extract, render

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("sinkmodel", "eval", "recipes")
# pdoc links each name that it shows. A name of ours that it left unlinked may no longer exist.
UNLINKED = re.compile(rf"(?<!\">)<code>((?:{'|'.join(ROOMS)})(?:\.\w+)+)(?:\(\))?</code>")
LINK = re.compile(r'href="([\w./]+\.html)(?:#([\w.-]+))?"')


def main(output: Path) -> int:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns, when it is imported, that it finds no GPU
    sys.path.insert(0, str(ROOT))  # import from this checkout, whatever is installed
    warnings.filterwarnings("error", module=r"pdoc\b")
    # pdoc looks up the annotations of an inherited field in the module of the class that inherits it.
    warnings.filterwarnings("ignore", r"Error parsing type annotation .*\.__init__\.", module=r"pdoc\b")
    render.configure(
        docformat="google", include_undocumented=False, template_directory=Path(__file__).parent / "templates"
    )
    modules: list[str] = []
    specs = []  # pdoc descends into a package by itself, unless that has `__all__`
    for name in names():
        resolve_exports(name)
        if name not in modules:
            specs.append(name)
            modules += extract.walk_specs([name])
    pdoc.pdoc(*specs, output_directory=output)
    dead = dead_ends(output)
    for page, name in dead:
        print(f"{page}: {name} has no target; correct the docstring, or the template", file=sys.stderr)
    if not dead:
        print(f"{len(modules)} modules; open {output / 'index.html'}")
    return 1 if dead else 0


def names() -> list[str]:
    """All modules of ROOMS, each package before its modules."""
    files = [path.relative_to(ROOT).with_suffix("") for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return [".".join(file.parts).removesuffix(".__init__") for file in files]


def resolve_exports(name: str) -> None:
    """Put the lazy exports of a package into its namespace, where pdoc looks for them."""
    module = importlib.import_module(name)
    for export in getattr(module, "__all__", ()):
        setattr(module, export, getattr(module, export))


def dead_ends(folder: Path) -> list[tuple[str, str]]:
    """(page, name) of each reference into these pages that has no target."""
    pages = {path.resolve(): path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.html"))}
    dead = []
    for path, text in pages.items():
        dead += [(path, name) for name in UNLINKED.findall(text) if not exists(name)]
        for target, anchor in LINK.findall(text):
            found = pages.get((path.parent / target).resolve(), "")
            if not found or (anchor and f'id="{anchor}"' not in found):
                dead.append((path, f"{target}#{anchor}".rstrip("#")))
    return [(str(path.relative_to(folder.resolve())), name) for path, name in dict.fromkeys(dead)]


def exists(name: str) -> bool:
    """Whether the name exists. It may exist without a docstring, and then has no place to link to."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs")))
