"""One private part of another package, and whether the installed version still has it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PrivatePart:
    """A name of another package.

    Attributes:
        package: its distribution, a key of READ_IN.
        name: a dotted path. It is imported and looked up, unless `check` does more.
        files: our files that use it.
        why: what we need it for, and what would break.
        patched: True if we replace it.
        check: returns False, or raises, if the part is not what we need. For attributes and layouts.
    """

    package: str
    name: str
    files: tuple[str, ...]
    why: str
    patched: bool = False
    check: Callable[[], Any] | None = None

    def exists(self) -> bool:
        """Whether the installed package still has this part."""
        return bool(self.check()) if self.check is not None else resolve(self.name) is not None


def resolve(name: str) -> Any:
    """The object at a dotted path: as many components as possible are imported, the rest are attributes."""
    components = name.split(".")
    for count in range(len(components), 0, -1):
        try:
            found = importlib.import_module(".".join(components[:count]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, components[count:], found)
    raise ModuleNotFoundError(name)
