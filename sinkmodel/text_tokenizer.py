"""The tokenizer of text out of the tokenizer of a model: without our sinks; and whether two of them are the same.

An export of ours has more than its data was prepared with: sinks, a template that puts them in front, names of unused
rows. All of that is taken out here. What somebody else's model has, `<s>` in front for one, stays.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from sinkmodel.errors import UserError
from sinkmodel.sinks import RESERVED_ROWS, SinkConfig
from sinkmodel.tokenizer import TextTokenizer, chat_template, template_without_sinks
from sinkmodel.unused_rows import unused_name

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
PADDING_NAMES = (PADDING, "<pad>", "[PAD]", "<|pad|>")
SINK_NAMES = SinkConfig("token", RESERVED_ROWS).names
PROBE = (
    "In the beginning of the book, as it was said to be one of the best, there is a lot of it for the most part; "
    "and on the other hand it's 12,345 (or so) of\n\nthe same ... 天地 and É… is the <s> of a new day. I don't know"
)


def text_tokenizer_of(tokenizer: Any, rows: int | None = None) -> TextTokenizer:
    """The text tokenizer in a loaded tokenizer of transformers.

    Args:
        rows: how many ids the model's file has; tokens that transformers adds beyond them are left out. By default all
            tokens stay.

    Raises UserError for a tokenizer that has no `tokenizer.json` (a slow one), and if its ids would move.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which has no tokenizer.json; convert it to a fast one "
            "and give the folder of that"
        )
    template = tokenizer.chat_template
    return as_text_tokenizer(backend, tokenizer.eos_token, tokenizer.pad_token, template, rows)


def as_text_tokenizer(
    backend: Tokenizer, eos: str | None, padding: str | None, template: Any = None, rows: int | None = None
) -> TextTokenizer:
    """The same from a tokenizer of `tokenizers` and what its settings say.

    Args:
        eos: the end-of-text token; None finds one with a usual name.
        padding: the padding token, likewise. The end of text as padding counts as none.
        template: the chat template, or several by name, of which `default` is taken.
        rows: as for `text_tokenizer_of`.
    """

    definition = _without_sinks(backend, rows)
    text = TextTokenizer(definition).backend()

    def find(named: str | None, usual: tuple[str, ...]) -> int | None:
        ids = [text.token_to_id(token) for token in ([named] if named else usual)]
        return next((token_id for token_id in ids if token_id is not None), None)

    eos_id, pad_id = find(eos, END_NAMES), find(padding, PADDING_NAMES)
    return TextTokenizer(definition, eos_id, None if pad_id == eos_id else pad_id, _strangers(template))


def text_encoder(definition: str) -> Tokenizer:
    """The tokenizer as raw text needs it: what looks like a special token is text.

    A corpus that spells `<|sink|>` or `<|endoftext|>` must not get one. `encode_special_tokens` does that for tokens
    marked special; a sink that somebody added as an ordinary token is marked here. Nothing is cut, padded or put in
    front.
    """
    content = json.loads(definition)
    for token in content.get("added_tokens", []):
        if token["content"].startswith(("<|sink", "<|end")):
            token["special"] = True
    content["truncation"] = content["padding"] = None
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = True
    return tokenizer


def same_tokenizer(one: TextTokenizer, other: TextTokenizer) -> str | None:
    """None if text has the same ids with both, else a phrase that says what differs.

    The ids of all tokens are compared, sinks and unused rows left out, and how a sample of prose is cut. Which token
    ends a text is not compared, nor how the two are written: what transformers builds from a GGUF file is written in
    another way than the `tokenizer.json` of the same model.
    """
    here, there = _tokens(one), _tokens(other)
    if len(here) != len(there):
        return f"{len(here):,} ids against {len(there):,}"
    if here != there:
        number, name = min((number, name) for name, number in here.items() if there.get(name) != number)
        return f"the token {name!r} has the id {number} against {there.get(name, 'none')}"
    encoders = [text_encoder(text.definition) for text in (one, other)]
    ids = [encoder.encode(PROBE, add_special_tokens=False).ids for encoder in encoders]
    return None if ids[0] == ids[1] else "it cuts a text into other tokens"


def _tokens(text: TextTokenizer) -> dict[str, int]:
    """Id by token, without sinks and names of unused rows."""
    return {name: number for name, number in _vocabulary(text.backend()).items() if not _is_spare(name, number)}


def _vocabulary(backend: Tokenizer) -> dict[str, int]:
    return backend.get_vocab(with_added_tokens=True)


def _is_spare(name: str, number: int) -> bool:
    return name in SINK_NAMES or name == unused_name(number)


# ------------------------------------------------------------------------------------------------- what is taken out


def _without_sinks(backend: Tokenizer, rows: int | None) -> str:
    """The definition without sinks, names of unused rows, truncation and padding. No other token's id moves.

    `tokenizers` numbers added tokens anew and leaves no holes. So a sink or an unused row that stands before a token
    which a fine-tuner has added stays, with the name of an unused row.
    """
    names = _vocabulary(backend)
    kept = [i for name, i in names.items() if not _is_spare(name, i) and (rows is None or i < rows)]
    end = max(kept, default=-1) + 1
    content = json.loads(backend.to_str())
    content["truncation"] = content["padding"] = None

    def renamed(name: str, number: int) -> str:
        return unused_name(number) if name in SINK_NAMES else name

    if len(kept) < len(names):
        content["added_tokens"] = [
            {**token, "content": renamed(token["content"], token["id"])}
            for token in content["added_tokens"]
            if token["id"] < end
        ]
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            vocabulary = {renamed(name, number): number for name, number in vocabulary.items() if number < end}
        else:  # of a Unigram: token and score, by id
            vocabulary = [[renamed(name, number), score] for number, (name, score) in enumerate(vocabulary[:end])]
        content["model"]["vocab"] = vocabulary
        content["post_processor"] = _without_sinks_in_front(content.get("post_processor"))
    cleaned = TextTokenizer(json.dumps(content, ensure_ascii=False)).backend()
    if _vocabulary(cleaned) != {renamed(name, number): number for name, number in names.items() if number < end}:
        raise UserError("the ids of the tokenizer have holes, so that they would move; renumber it first")
    return cleaned.to_str()


def _without_sinks_in_front(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """A post-processor without the sinks; None if it does nothing else."""
    if processor is None:
        return None
    if processor["type"] == "Sequence":
        parts = [_without_sinks_in_front(part) for part in processor["processors"]]
        parts = [part for part in parts if part is not None]
        return {**processor, "processors": parts} if parts else None
    if processor["type"] != "TemplateProcessing" or not set(SINK_NAMES) & set(processor["special_tokens"]):
        return processor
    special = {name: token for name, token in processor["special_tokens"].items() if name not in SINK_NAMES}
    templates = {
        key: [piece for piece in processor[key] if piece.get("SpecialToken", {}).get("id") not in SINK_NAMES]
        for key in ("single", "pair")
    }
    return {**processor, **templates, "special_tokens": special} if special else None


def _strangers(template: Any) -> str | None:
    """A chat template without the sinks in front of it; None for ours, since every export writes it again."""
    if isinstance(template, list):  # as tokenizer_config.json has several
        template = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        return None
    counts = range(1, RESERVED_ROWS + 1)
    ours = [chat_template(sink) for sink in (SinkConfig(), *(SinkConfig("token", n) for n in counts))]
    if template.endswith(tuple(ours)):  # a model that has `<s>` in front has it in front of ours too
        return None
    return template_without_sinks(template)
