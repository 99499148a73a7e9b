"""Write a tokenizer into a GGUF file, and refuse those for which llama.cpp would compute other ids.

llama.cpp identifies the way in which a tokenizer splits a text only by a name (`tokenizer.ggml.pre`). So a pattern is
looked up in PATTERNS, whose names come from llama.cpp's `convert_hf_to_gguf_update.py`. The normalizer NFC of Pythia
and Qwen is ignored: llama.cpp does not normalise, so a text that is not in NFC gets other ids there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gguf

from sinkmodel.errors import UserError
from sinkmodel.sinks import SinkConfig
from sinkmodel.tokenizer import TextTokenizer, chat_template_of, sink_tokenizer
from sinkmodel.unused_rows import unused_name

UNKNOWN_TO_IT = (
    *("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"),
)  # settings of a BPE that llama.cpp does not support
GPT_2, BYTES = ("ByteLevel", True), ("ByteLevel", False)  # with GPT-2's pattern, and without a pattern
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = ("Split", rf"{LETTERS}|\p{{N}}{{1,3}}|{REST}")
QWEN = ("Split", rf"{LETTERS}|\p{{N}}|{REST}")
# Keys: the steps that split a text, and whether a word that is a token needs no merges. Values: llama.cpp's names.
PATTERNS = {
    ((GPT_2,), False): "gpt-2",
    ((("Digits", True), GPT_2), False): "smollm",
    ((LLAMA_3, BYTES), True): "llama-bpe",
    ((LLAMA_3, BYTES), False): "smaug-bpe",
    ((QWEN, BYTES), False): "qwen2",
}


def pattern_of(definition: dict[str, Any]) -> str | None:
    """llama.cpp's name for the way in which a `tokenizer.json` splits a text; None if it is unknown."""
    cut = definition.get("pre_tokenizer") or {}
    steps = tuple(_step(step) for step in (cut["pretokenizers"] if cut.get("type") == "Sequence" else [cut]))
    return PATTERNS.get((steps, bool(definition["model"].get("ignore_merges"))))


def _step(step: dict[str, Any]) -> tuple[Any, ...]:
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return kind, step.get("use_regex", True)
    if kind == "Digits":
        return kind, step["individual_digits"]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return kind, step["pattern"].get("Regex")
    return (kind, None)


def check_tokenizer(text: TextTokenizer, sink: SinkConfig) -> None:
    """Raise UserError for a tokenizer for which llama.cpp would compute other ids."""
    definition = json.loads(text.definition)
    model, normalizer = (definition.get(name) or {} for name in ("model", "normalizer"))
    added = definition.get("added_tokens") or []
    odd = [name for name in UNKNOWN_TO_IT if model.get(name)]
    reason = None
    if model.get("type") != "BPE":
        reason = f"its model is {model.get('type')!r}, not BPE"
    elif odd:
        reason = f"its BPE has {odd[0]}"
    elif pattern_of(definition) is None:
        reason = "it splits a text in another way than GPT-2, SmolLM, Llama 3 and Qwen 2"
    elif normalizer.get("type", "NFC") != "NFC":
        reason = f"it has the normalizer {normalizer['type']!r}"
    elif any(token[side] for token in added for side in ("lstrip", "rstrip", "single_word")):
        reason = "it has tokens that include the blanks around them, or that match only whole words"
    elif not sink.tokens and (len(text.front) > 1 or text.backend().encode("").ids != list(text.front)):
        reason = "it adds tokens to a text other than one in front"
    elif text.eos_id is None:
        reason = "it has no end-of-text token"
    if reason is not None:
        raise UserError(f"llama.cpp cannot run this tokenizer: {reason}; export it with --format transformers")


def add_tokenizer(writer: Any, text: TextTokenizer, sink: SinkConfig, rows: int) -> None:
    backend = sink_tokenizer(text, sink)
    definition = json.loads(backend.to_str())
    names, kinds = zip(*token_list(definition, rows))
    merges = definition["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pattern_of(definition))
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    ids = sink.ids(text.vocabulary) or list(text.front)
    assert text.eos_id is not None
    writer.add_bos_token_id(ids[0] if ids else text.eos_id)  # without one, llama.cpp uses GPT-2's id
    writer.add_eos_token_id(text.eos_id)
    writer.add_pad_token_id(text.eos_id if text.pad_id is None else text.pad_id)
    writer.add_add_bos_token(bool(ids))
    writer.add_add_eos_token(False)
    writer.add_chat_template(chat_template_of(text, sink))


def token_list(definition: dict[str, Any], rows: int) -> Iterator[tuple[str, int]]:
    """Name and llama.cpp's token type of each of the `rows` ids. Ids without a token are marked as unused."""
    added = {token["id"]: token for token in definition["added_tokens"]}
    plain = {number: name for name, number in definition["model"]["vocab"].items()}
    for number in range(rows):
        if number in added:
            kind = gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED
            yield added[number]["content"], kind
        elif number in plain:
            yield plain[number], gguf.TokenType.NORMAL
        else:
            yield unused_name(number), gguf.TokenType.UNUSED
