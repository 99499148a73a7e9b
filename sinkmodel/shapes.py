"""Sizes of a model, from a config. Does not import torch: a config is checked before anything heavy is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sinkmodel.checks import check_bounds, choices_of, one_of
from sinkmodel.errors import UserError

Architecture = Literal["gpt_neox", "llama"]
Parts = Literal["all", "sink", "sink+norms"]  # what a run may train of an existing model
PARTS = choices_of(Parts)
SinkRow = Literal["mean", "bos", "random"]  # initial value of a new sink's row: see `bases.start_rows`


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder. The defaults are Pythia-160M's (EleutherAI/pythia, models/160M/pythia-160m.yml).

    Args:
        architecture: `gpt_neox` (parallel residual, LayerNorm, biases) or `llama` (RMSNorm, SwiGLU, no biases).
        layers: number of transformer blocks (attention and feed-forward).
        hidden: width of the residual stream, d.
        heads: attention heads per layer; `hidden` must be divisible by it.
        kv_heads: key and value heads per layer; may be fewer than `heads` only for `llama`.
        ffn: width of the feed-forward layer.
        positions: longest training sequence in tokens, sinks included.
        rotary_pct: share of each head's dimensions that is rotated; below 1 only for `gpt_neox`.
        rope_theta: base of the rotary frequencies.
        tie_embeddings: whether the output projection shares the embedding's weights.
        vocabulary: rows of the embedding; with null, what the data's tokenizer needs, rounded up to 128.
    """

    architecture: Architecture = "gpt_neox"
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    kv_heads: int = 12
    ffn: int = 3072
    positions: int = 2048
    rotary_pct: float = 0.25
    rope_theta: float = 10000.0
    tie_embeddings: bool = False
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        one_of("model.architecture", self.architecture, Architecture)
        for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "positions", "vocabulary"):
            check_bounds(f"model.{name}", getattr(self, name), least=1)
        check_bounds("model.rotary_pct", self.rotary_pct, above=0, most=1)
        if self.hidden % self.heads:
            raise UserError(f"model.hidden is {self.hidden}, which is not divisible by model.heads = {self.heads}")
        if self.heads % self.kv_heads:
            raise UserError(f"model.heads is {self.heads}, which is not divisible by model.kv_heads = {self.kv_heads}")
        if self.architecture == "gpt_neox" and self.kv_heads != self.heads:
            raise UserError("model.kv_heads must equal model.heads for gpt_neox, which has no grouped heads")
        if self.architecture == "llama" and self.rotary_pct != 1:
            raise UserError("model.rotary_pct must be 1 for llama, which rotates whole heads")
