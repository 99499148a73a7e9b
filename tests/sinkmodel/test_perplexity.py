"""Guards: perplexity is computed in one place, and is finite for every loss, since JSON has no infinity."""

from __future__ import annotations

import math
import re
from pathlib import Path

from sinkmodel.perplexity import perplexity

ROOT = Path(__file__).resolve().parents[2]


def test_perplexity_of_a_hopeless_loss_is_finite_and_no_error():
    assert perplexity(1.0) == math.e
    assert perplexity(700.0) == perplexity(1000.0) == perplexity(math.inf) == math.exp(700)
    assert math.isnan(perplexity(math.nan))
    assert perplexity(None) is None


def test_no_other_file_has_a_perplexity_of_its_own():
    """Risk: six copies, of which two were infinite for a loss of 700."""
    files = [path for room in ("sinkmodel", "recipes", "eval") for path in (ROOT / room).rglob("*.py")]
    assert [path.name for path in files if re.search(r"math\.exp\(", path.read_text(encoding="utf-8"))] == [
        "perplexity.py"
    ]
