"""The sink as an ordinary token: the tokenizer itself prepends it, exactly once."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from sinkmodel.errors import UserError
from sinkmodel.sinks import RESERVED_ROWS, SinkConfig, is_ours, sink_ids_of
from sinkmodel.unused_rows import UNUSED, unused_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A plain template. Base models are not trained on chats, but a chat must also begin with the sink, and only begin.
CHAT_TEMPLATE = (
    "{{ SINKS }}{% for message in messages %}"
    "{{ message['role'] | capitalize CLEANED }}: {{ message['content'] CLEANED }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Put before a third-party template. If that writes `bos_token`, once or in each turn (Llama 2), nothing appears.
NO_BOS = "{% set bos_token = '' %}"


@dataclass(frozen=True)
class TextTokenizer:
    """The tokenizer of the data: a `tokenizer.json` as a string, and its special ids. It has no sink.

    Args:
        definition: the content of `tokenizer.json`.
        eos_id: id of the end-of-text token; None if there is none.
        pad_id: id of the padding token; None if there is none.
        front: ids that it prepends to every text by itself, if the model was trained with them and has no sink
            of ours: `<s>` of Llama 2.
        chat_template: the template of a third-party model, unchanged; None for our plain one (see `chat_template`).

    Raises UserError if the JSON is not a tokenizer.
    """

    definition: str
    eos_id: int | None = None
    pad_id: int | None = None
    chat_template: str | None = None
    front: tuple[int, ...] = ()

    @classmethod
    def from_file(cls, path: Path, eos_id: int | None = None, pad_id: int | None = None) -> TextTokenizer:
        try:
            return cls(path.read_text(encoding="utf-8"), eos_id, pad_id)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: the tokenizer cannot be read ({error})") from None

    def backend(self) -> Tokenizer:
        try:
            return Tokenizer.from_str(self.definition)
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"the tokenizer.json is not one that tokenizers can read ({error})") from None

    @property
    def vocabulary(self) -> int:
        """Number of ids in use, special tokens included. It is also the first free id."""
        return _vocabulary(self.definition)


@functools.lru_cache(maxsize=4)
def _vocabulary(definition: str) -> int:
    """Remembered, because reading a tokenizer of 50,000 ids takes a tenth of a second."""
    return max(TextTokenizer(definition).backend().get_vocab(with_added_tokens=True).values()) + 1


def sink_tokenizer(text: TextTokenizer, sink: SinkConfig) -> Tokenizer:
    """The text tokenizer with the sink tokens added after its ids and prepended to everything it encodes.

    They replace whatever the text tokenizer itself prepends, such as `<s>`. Without a sink it stays unchanged.
    """
    backend = text.backend()
    if sink.tokens == 0:
        return backend
    ids = sink.ids(text.vocabulary)
    taken = [name for name in sink.names if backend.token_to_id(name) is not None]
    if taken:
        raise UserError(f"the tokenizer already has a token {taken[0]}; encode the data with one that has no sink")
    # If the ids have holes, tokenizers may give a new token one of the free ids. So the new ids are checked.
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in sink.names])
    given = [backend.token_to_id(name) for name in sink.names]
    if given != ids:
        raise UserError(f"the tokenizer numbers new tokens {given}, not {ids}: its ids have holes; renumber it first")
    front = " ".join(sink.names)
    backend.post_processor = TemplateProcessing(
        single=f"{front} $A", pair=f"{front} $A $B:1", special_tokens=list(zip(sink.names, ids))
    )
    return backend


def chat_template(sink: SinkConfig) -> str:
    """One turn per line, with the sinks in front. A message cannot contain a sink token."""
    # Insert a blank instead of removing the name: what is left after a removal could form the name again.
    cleaned = "| replace('<|sink', '<| sink')" if sink.tokens else ""
    return CHAT_TEMPLATE.replace("{{ SINKS }}", "".join(sink.names)).replace("CLEANED", cleaned)


def chat_template_of(text: TextTokenizer, sink: SinkConfig) -> str:
    """The chat template of a model. It begins with the sinks, or with `front` if the model has no sink.

    A third-party template stays unchanged, but its `bos_token` is set to empty and the sinks come first. So they appear
    once, whether the template writes `bos_token` never, at the beginning, or in each turn.
    """
    if text.chat_template is None:
        return "".join(_names(text, text.front)) + chat_template(sink)
    if not sink.tokens:
        return text.chat_template
    return NO_BOS * ("bos_token" in text.chat_template) + "".join(sink.names) + text.chat_template


def template_without_sinks(template: str) -> str:
    """A third-party template as it was before `chat_template_of` put sinks in front of it."""
    template = template.removeprefix(NO_BOS)
    for name in SinkConfig("token", RESERVED_ROWS).names:
        template = template.removeprefix(name)
    return template


def _names(text: TextTokenizer, ids: Iterable[int]) -> list[str]:
    backend = text.backend()
    return [str(backend.id_to_token(token)) for token in ids]


def tokenizer_settings(text: TextTokenizer, sink: SinkConfig, positions: int | None) -> dict[str, Any]:
    """The content of `tokenizer_config.json`, such that both transformers 4.57 and 5.x can read it.

    The class is not GPTNeoXTokenizer, which drops the post-processor and with it the sink. It is not
    `TokenizersBackend` either, which transformers 5 would write and 4.57 does not know.
    """
    backend = text.backend()
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"model_max_length": positions} if positions is not None else {}),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": chat_template_of(text, sink),
    }
    if front := sink.names or _names(text, text.front):
        settings["bos_token"] = front[0]
    if text.eos_id is not None:
        settings["eos_token"] = backend.id_to_token(text.eos_id)
    pad_id = text.eos_id if text.pad_id is None else text.pad_id
    if pad_id is not None:
        settings["pad_token"] = backend.id_to_token(pad_id)
    return settings


def save_tokenizer(folder: Path, text: TextTokenizer, sink: SinkConfig, positions: int | None, rows: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which AutoTokenizer loads without code of ours.

    Each of the `rows` of the model gets a name, as the reserved tokens of Llama 3 do. Otherwise a token that a user
    adds would get one of the rows that were never trained, and the export suppresses these in generation.
    """
    backend = sink_tokenizer(text, sink)
    free = range(text.vocabulary + sink.tokens, rows)
    backend.add_special_tokens([AddedToken(unused_name(row), special=True, normalized=False) for row in free])
    backend.save(str(folder / "tokenizer.json"))
    settings = json.dumps(tokenizer_settings(text, sink, positions), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")


def suppressed_ids(model: Any, tokenizer: Any = None) -> set[int]:
    """The ids that generation must not produce: sinks, those that the generation config suppresses, and unused rows.

    Exports of earlier versions suppress every row that was free at the time. A token that was added later then could
    not be generated, so ids that have a token now are removed from such a list.
    """
    listed = set(getattr(model.generation_config, "suppress_tokens", None) or ())
    sinks = set(sink_ids_of(model.config))
    if tokenizer is None:
        return listed | sinks
    vocabulary = tokenizer.get_vocab()
    tokens = {number for name, number in vocabulary.items() if not UNUSED.fullmatch(name)}
    if is_ours(model.config):
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, *ends):
            sinks.add(tokenizer.pad_token_id)
        free = max(listed, default=-1)
        while free in listed:
            free -= 1
        if max(listed, default=-1) - free >= RESERVED_ROWS:  # the last rows of a vocabulary: the list of an export
            listed -= {number for number in tokenizer.added_tokens_decoder if number > free} & tokens
    rows = range(model.get_input_embeddings().num_embeddings)
    return listed | sinks | (set(rows) - tokens)


def load_tokenizer(text: TextTokenizer, sink: SinkConfig, positions: int | None) -> PreTrainedTokenizerFast:
    """The same tokenizer in memory, without a folder."""
    from transformers import PreTrainedTokenizerFast  # imported here: sink-prepare imports this module without models

    settings = tokenizer_settings(text, sink, positions)
    del settings["tokenizer_class"]
    return PreTrainedTokenizerFast(tokenizer_object=sink_tokenizer(text, sink), **settings)


def base_ids(tokenizer: Any) -> set[int]:
    """The ids of a transformers tokenizer without added tokens, for which a model may have no rows."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return set(backend.get_vocab(with_added_tokens=False).values())
    return set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)


def check_rows(ids: Iterable[int], rows: int, tokenizer: Any = None) -> None:
    """Raise UserError if one of the token ids has no row in the model's embedding."""
    for token in ids:
        if not 0 <= token < rows:
            name = tokenizer.convert_ids_to_tokens(token) if tokenizer is not None and token >= 0 else None
            named = f" of the token {name!r}" if name is not None else ""
            raise UserError(
                f"the model has no id {token}{named}, its ids are 0 to {rows - 1}; leave it out, or give "
                "the model a row for it (resize_token_embeddings)"
            )
