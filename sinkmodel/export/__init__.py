"""Export a training checkpoint for other programs: as a folder for transformers, a GGUF file, or a row file."""

from typing import TYPE_CHECKING, Any

from sinkmodel.export.command import main

if TYPE_CHECKING:
    from sinkmodel.export.folder import PROVENANCE, export

__all__ = ["PROVENANCE", "export", "main"]


def __getattr__(name: str) -> Any:
    """Import on first use: both import torch, which `--help` does not need."""
    if name in ("PROVENANCE", "export"):
        from sinkmodel.export import folder

        return getattr(folder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
