"""Guards: an export loads in transformers 4.57 too, with nothing of ours installed, and computes the same.

TRANSFORMERS_4 names the Python of an environment with torch and transformers 4.57 alone; `make test` makes and sets it.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinkmodel.export import export
from sinkmodel.sinks import SinkConfig
from tests import tiny
from tests.plain import json_printed_by, transformers_4
from tests.sinkmodel.test_export import refusals, softmax_exports

PROGRAM = """
import importlib.util, json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

def look(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["a b c", "d e f g h i"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokenizer("a b c d e f g", return_tensors="pt")).logits
    torch.save(logits, folder + ".logits.pt")
    return {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "single": tokenizer("a b c").input_ids,
        "pair": tokenizer("a b c", "d").input_ids,
        "batch": batch.input_ids.tolist(),
        "cut": tokenizer("a b c d e f g h", truncation=True, max_length=5).input_ids,
        "chat": tokenizer.apply_chat_template([{"role": "user", "content": "a <|sink|>"}], tokenize=True),
        "greedy": model.generate(**batch, max_new_tokens=12, do_sample=False).tolist(),
        "suppressed": model.generation_config.suppress_tokens,
    }

ours = importlib.util.find_spec("sinkmodel") is not None
print(json.dumps([transformers.__version__, ours, {folder: look(folder) for folder in sys.argv[1:]}]))
"""
SINKS = {"vanilla": SinkConfig(), "one sink": SinkConfig("token"), "two sinks": SinkConfig("token", 2)}
CASES = [(architecture, name) for architecture in tiny.SHAPES for name in SINKS]


@pytest.fixture(scope="module")
def seen_by_4_57(tmp_path_factory):
    """All exports, looked at in one process of the other environment."""
    place = tmp_path_factory.mktemp("exports")
    folders = {}
    for i, (architecture, name) in enumerate(CASES):
        checkpoint = tiny.checkpoint(place / f"run{i}", architecture, SINKS[name])
        folders[architecture, name] = export(checkpoint, place / f"model{i}")
    version, ours, seen = json_printed_by(transformers_4(), PROGRAM, *folders.values(), place=place)
    assert version.startswith("4.57.")
    assert not ours
    return {case: (folder, seen[str(folder)]) for case, folder in folders.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(case))
def test_it_loads_in_4_57_without_us_and_computes_the_same(seen_by_4_57, case):
    folder, there = seen_by_4_57[case]
    assert there["missing"] == there["unexpected"] == []
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = SINKS[case[1]].ids(tiny.tokenizer().vocabulary)
    for name in ("single", "pair", "cut", "chat"):
        assert there[name][: len(ids)] == ids, name
        assert not set(ids) & set(there[name][len(ids) :]), name
    assert there["single"] == tokenizer("a b c").input_ids
    assert there["suppressed"] == model.generation_config.suppress_tokens
    batch = tokenizer(["a b c", "d e f g h i"], padding=True, return_tensors="pt")
    assert there["batch"] == batch.input_ids.tolist()
    assert there["greedy"] == model.generate(**batch, max_new_tokens=12, do_sample=False).tolist()
    with torch.no_grad():
        logits = model(**tokenizer("a b c d e f g", return_tensors="pt")).logits
    assert (torch.load(f"{folder}.logits.pt", weights_only=True) - logits).abs().max() < 1e-5


@pytest.mark.slow
def test_4_57_does_not_load_a_softmax_without_its_sink(tmp_path):
    folders = softmax_exports(tmp_path)
    for (folder, loader), message in refusals(transformers_4(), folders, tmp_path).items():
        assert "LOADED" not in message
        assert not loader.startswith("Auto") or f"`sink_{folders[folder][0]}`" in message
