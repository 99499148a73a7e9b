"""Extract the text tokenizer (without our sinks) from a model's tokenizer, and compare two tokenizers.

Our exports add to the tokenizer that the data was prepared with: sinks, a template that prepends them, names of unused
rows. All of that is removed here. Properties of a third-party tokenizer, such as a prepended `<s>`, stay.
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
    """The text tokenizer inside a loaded transformers tokenizer.

    Args:
        rows: number of ids in the model's file. Tokens that transformers adds beyond them are removed. With None, all
            tokens stay.

    Raises UserError for a slow tokenizer, which has no `tokenizer.json`, and if token ids would change.
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
    """As `text_tokenizer_of`, from a tokenizer of the `tokenizers` library and its settings.

    Args:
        eos: the end-of-text token; with None, one with a usual name is searched for.
        padding: the padding token; None as for `eos`. If it is also the end of text, it does not count.
        template: the chat template, or several by name, of which `default` is used.
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
    """The tokenizer for raw text, in which the spelling of a special token is ordinary text.

    A corpus that spells `<|sink|>` or `<|endoftext|>` must not produce these tokens. `encode_special_tokens` achieves
    this for tokens that are marked special. A sink that was added as an ordinary token is marked special here. The
    tokenizer does not truncate, pad or prepend anything.
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
    """None if both give the same ids to a text, else a phrase that describes the difference.

    Compares the ids of all tokens, except sinks and unused rows, and the encoding of a sample of prose. It does not
    compare the end-of-text token or how the two are written as JSON: transformers builds a tokenizer from a GGUF file
    whose JSON differs from the `tokenizer.json` of the same model.
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
    """Maps token to id, without sinks and names of unused rows."""
    return {name: number for name, number in _vocabulary(text.backend()).items() if not _is_spare(name, number)}


def _vocabulary(backend: Tokenizer) -> dict[str, int]:
    return backend.get_vocab(with_added_tokens=True)


def _is_spare(name: str, number: int) -> bool:
    return name in SINK_NAMES or name == unused_name(number)


# ---------------------------------------------------------------------------------------------------- what is removed


def _without_sinks(backend: Tokenizer, rows: int | None) -> str:
    """The definition without sinks, names of unused rows, truncation and padding. No other token's id changes.

    `tokenizers` renumbers added tokens so that the ids have no holes. If a sink or an unused row comes before a token
    that a fine-tuner added, it therefore stays, under the name of an unused row.
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
        raise UserError("the ids of the tokenizer have holes, so some of them would change; renumber it first")
    return cleaned.to_str()


def _without_sinks_in_front(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """The post-processor without the sinks; None if nothing is left of it."""
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
    """A chat template without the sinks in front of it; None for our own, which every export writes again."""
    if isinstance(template, list):  # tokenizer_config.json with several templates
        template = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        return None
    counts = range(1, RESERVED_ROWS + 1)
    ours = [chat_template(sink) for sink in (SinkConfig(), *(SinkConfig("token", n) for n in counts))]
    if template.endswith(tuple(ours)):  # if the model has `<s>` in front, our template begins with it
        return None
    return template_without_sinks(template)
