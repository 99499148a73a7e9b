"""Tiny models that exist already, as somebody else would have saved them: a folder with weights and a tokenizer."""

from __future__ import annotations

from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests import models, tiny

FULL = 300  # rows of a base whose embedding has none free: tests.tiny's tokenizer has as many ids


def save_base(folder: Path, family: str = "llama", rows: int = FULL, bos: bool = False, **changes: object) -> Path:
    """Write a model of tests.models. `bos`: its tokenizer puts `<s>` (id 300) in front of every text."""
    text = tiny.tokenizer()
    backend = text.backend()
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
    if bos:
        backend.add_special_tokens(["<s>"])
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", FULL)])
        special["bos_token"] = "<s>"
        rows = max(rows, FULL + 1)
    settings = {"vocab_size": rows, "max_position_embeddings": 128, "initializer_range": 0.1, **changes}
    model = models.build(family, **settings)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder
