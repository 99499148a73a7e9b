"""Print the table of private parts as a page."""

from __future__ import annotations

from tests.private_parts import PRIVATE_PARTS, READ_IN

INTRODUCTION = """\
# What we use of other packages' private parts

Made by `python -m tests.private_parts` from the table in `tests/private_parts/`; change the table, not this page. The
versions are those whose source was read. `tests/test_private_parts.py` checks that each part is still there in the
packages that are installed, and that the code uses no other private name.
"""


def page() -> str:
    """The table as Markdown."""
    lines = [INTRODUCTION.rstrip()]
    for package, version in READ_IN.items():
        lines += ["", f"## {package} {version}", "", "| name | used in | why |", "|---|---|---|"]
        for part in (part for part in PRIVATE_PARTS if part.package == package):
            files = ", ".join(f"`{file}`" for file in part.files)
            name = f"`{part.name}`" + (" (replaced)" if part.patched else "")
            lines.append(f"| {name} | {files} | {part.why} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
