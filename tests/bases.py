"""Tiny models that exist already, as somebody else would have saved them: a folder with weights and a tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sinkmodel.tokenizer import TextTokenizer
from tests import models, tiny

FULL = 300  # rows of a base whose embedding has none free: tests.tiny's tokenizer has as many ids


def text_tokenizer(bos: bool = False) -> TextTokenizer:
    """tests.tiny's tokenizer. `bos`: it puts `<s>` (id 300) in front of every text."""
    text = tiny.tokenizer()
    if not bos:
        return text
    backend = text.backend()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", FULL)])
    return replace(text, definition=backend.to_str())


def save_base(folder: Path, family: str = "llama", rows: int = FULL, bos: bool = False, **changes: object) -> Path:
    """Write a model of tests.models, with `text_tokenizer`."""
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|padding|>", **({"bos_token": "<s>"} if bos else {})}
    rows = max(rows, FULL + 1) if bos else rows
    settings = {"vocab_size": rows, "max_position_embeddings": 128, "initializer_range": 0.1, **changes}
    models.build(family, **settings).save_pretrained(folder)
    tokenizer = text_tokenizer(bos).backend()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder
