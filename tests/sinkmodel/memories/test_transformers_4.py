"""Guards: on transformers 4.57 every memory keeps and computes what it does on the one that we develop with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import model_of
from tests.plain import json_printed_by, transformers_4
from tests.sinkmodel.memories.generated import AFTER, BUDGET, FAMILIES, PADS, PROMPT, outcomes

PROGRAM = """
import json, sys
checkout, weights, found = sys.argv[1:]
sys.path.insert(0, checkout)
import torch, transformers
from tests.sinkmodel.memories.generated import outcomes
torch.set_num_threads(1)
by_family = torch.load(weights, weights_only=True)
torch.save({family: outcomes(family, of_one) for family, of_one in by_family.items()}, found)
print(json.dumps(transformers.__version__))
"""


@pytest.mark.slow
def test_memories_are_the_same_on_4_57(tmp_path):
    weights = {family: [x.data for x in model_of(family).parameters()] for family in FAMILIES}
    torch.save(weights, tmp_path / "weights.pt")
    checkout = Path(__file__).parents[3]
    version = json_printed_by(
        transformers_4(), PROGRAM, checkout, tmp_path / "weights.pt", tmp_path / "found.pt", place=tmp_path
    )
    assert version.startswith("4.57.")
    there = torch.load(tmp_path / "found.pt", weights_only=True)
    for family in FAMILIES:
        for name, here in outcomes(family, weights[family]).items():
            theirs = there[family][name]
            case = f"{family}, {name}"
            torch.testing.assert_close(theirs.pop("logits"), here.pop("logits"), atol=1e-5, rtol=0, msg=case)
            assert torch.equal(theirs.pop("ids"), here.pop("ids")), case
            assert theirs == here, case
            assert here["columns"] == PROMPT + AFTER - 1
            if name in ("h2o", "tova"):
                assert {len(head) for layer in here["kept"] for row in layer for head in row} == {BUDGET}, case
            elif name == "dense":
                assert len(here["kept"][0][0][0]) == PROMPT - PADS + AFTER - 1
            elif name == "namm":
                sizes = {len(head) for layer in here["kept"] for row in layer for head in row}
                assert len(sizes) > 2, f"{case}: heads of several sizes"
                assert max(sizes) < PROMPT, case
