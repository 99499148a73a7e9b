"""The export: a training checkpoint becomes what other programs load, a folder for transformers or a GGUF file."""

from typing import TYPE_CHECKING, Any

from sinkmodel.export.command import main

if TYPE_CHECKING:
    from sinkmodel.export.folder import PROVENANCE, export

__all__ = ["PROVENANCE", "export", "main"]


def __getattr__(name: str) -> Any:
    """What needs torch when it is asked for: --help can do without."""
    if name in ("PROVENANCE", "export"):
        from sinkmodel.export import folder

        return getattr(folder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
