"""StreamingLLM's numbers (arXiv 2309.17453, Tables 2, 3 and 6): perplexity on PG-19 by model, sink, budget and S.

Table 3 uses the first test book, Tables 2 and 6 use 400K tokens. The paper's other two models, Falcon-7B and MPT-7B,
are missing because `sinkmodel.scoring` does not support them: Falcon's attention cannot be exchanged, and MPT has no
rotary positions.
"""

from __future__ import annotations

from typing import Any

from eval.measures.verdict.training import SIZES

Model = tuple[str | int | None, ...]  # in the order of SIZES
PYTHIA_160M: Model = ("gpt_neox", 12, 768, 12, None, 3072, 2048)
PYTHIA_12B: Model = ("gpt_neox", 36, 5120, 40, None, 20480, 2048)
LLAMA_2_7B: Model = ("llama", 32, 4096, 32, 32, 11008, 4096)
PAPER = {
    (PYTHIA_160M, "none", 1024): {0: 27.87, 1: 18.49, 2: 18.05, 4: 18.05},
    (PYTHIA_160M, "zero", 1024): {0: 29214.0, 1: 19.90, 2: 18.27, 4: 18.01},
    (PYTHIA_160M, "token ×1", 1024): {0: 1235.0, 1: 18.01, 2: 18.01, 4: 18.02},
    (PYTHIA_160M, "token ×2", 1024): {0: 1262.0, 1: 25.73, 2: 18.05, 4: 18.05},
    (PYTHIA_12B, "none", 2048): {0: 21.62, 1: 11.95, 2: 12.09, 4: 12.09, 8: 12.02},
    (LLAMA_2_7B, "none", 512): {4: 9.73},
    (LLAMA_2_7B, "none", 1024): {4: 9.32},
    (LLAMA_2_7B, "none", 2048): {4: 9.08},
    (LLAMA_2_7B, "none", 4096): {0: 3359.95, 1: 11.88, 2: 10.51, 4: 9.59, 8: 9.54},
}


def model_of(shape: dict[str, Any]) -> Model:
    """A shape (`training.shape_of`) as a key of PAPER."""
    return tuple(shape[size] for size in SIZES)


def of_paper(shape: dict[str, Any], kind: str, budget: int, sinks: int) -> float | None:
    """The paper's perplexity of a model of this shape and sink; None if the paper has no such model."""
    return PAPER.get((model_of(shape), kind, budget), {}).get(sinks)
