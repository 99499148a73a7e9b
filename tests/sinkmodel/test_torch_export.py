"""Guards: the code for torch.export in docs/runtimes.md works as it is printed there, for texts of any length."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinkmodel.export import export
from tests import tiny

PAGE = Path(__file__).resolve().parents[2] / "docs" / "runtimes.md"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", tiny.SHAPES)
def test_the_lines_of_the_page_export_the_model(architecture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = export(tiny.checkpoint(tmp_path / "run", architecture), tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    section = PAGE.read_text(encoding="utf-8").split("## torch.export")[1]
    (lines,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    exec(lines, {"model": model, "tokenizer": tokenizer})
    program = torch.export.load("sink.pt2").module()
    for text in ("a", "a b c d e f g " * 5):
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert ids[0, 0] == tokenizer.bos_token_id
        assert torch.equal(program(ids), model(ids).logits)
