"""The text tokenizer: from the Hub, from a tokenizer.json, or a byte-level BPE trained on the spot."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from recipes.data.troubles import quiet
from sinkmodel.errors import UserError
from sinkmodel.files import read_json
from sinkmodel.secrets import hub_token
from sinkmodel.sinks import SinkConfig
from sinkmodel.text.content import not_text
from sinkmodel.unused_rows import UNUSED, without_unused

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
PADDING_NAMES = (PADDING, "<pad>", "[PAD]", "<|pad|>")
PROBE = (
    "In the beginning of the book, as it was said to be one of the best, there is a lot of it for the most part; "
    "and on the other hand it's 12,345 (or so) of\n\nthe same ... 天地 and É… is the <s> of a new day. I don't know"
)
LONGEST_WORD = 1 << 12  # bytes; each merge of the BPE training moves the rest of its word
SMALLEST_VOCABULARY = 256 + 2  # every byte and the two special tokens


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as the shards need it. `definition` is its tokenizer.json."""

    definition: str
    size: int  # ids in use, special tokens included
    eos_id: int
    pad_id: int | None


def load_vocabulary(name: str) -> Vocabulary:
    """From a tokenizer.json, a folder that holds one, or the name of a Hub repository.

    Raises UserError where there is none, it is broken, or it has no end-of-text token: the one that a
    tokenizer_config.json beside it names, or a special token with a usual name.
    """
    given = Path(name)
    file = given / "tokenizer.json" if given.is_dir() else given
    settings = file.with_name("tokenizer_config.json")
    if not file.is_file():
        if file.suffix == ".json" or given.is_dir() or name.count("/") > 1 or name.startswith((".", "/")):
            raise UserError(
                f"the tokenizer {file} does not exist; give a tokenizer.json or the name of a Hub repository"
            )
        file, settings = _download(name)
    if why := not_text(file.read_bytes()[: 1 << 12], 0, file):
        raise UserError(f"{file} {why}")
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{file} is no tokenizer.json that tokenizers can read ({error}); check the file") from None
    named = read_json(settings) if settings.is_file() else {}
    if not isinstance(named, dict):
        raise UserError(f"{settings} is not a JSON object with the tokenizer's settings; check the file or remove it")
    return _vocabulary(tokenizer, str(file), named)


def train_vocabulary(texts: Iterable[str], size: int) -> Vocabulary:
    """A byte-level BPE of `size` ids, made like Pythia's: end of text is id 0, padding id 1, NFC, no added space.

    The same texts in the same order give the same tokenizer. Fewer ids come out where there is too little text. A word
    longer than LONGEST_WORD (DNA, blanks) is learned from in parts, since the time to learn from it grows with the
    square of its length; it is encoded whole.
    """
    assert size >= SMALLEST_VOCABULARY
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_WORD)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    return _vocabulary(tokenizer, "the trained tokenizer", {})


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


def cuts_exactly(definition: str) -> bool:
    """Whether text cut just before a lone space gives the same tokens as uncut.

    True of byte-level BPE and everything else that splits there by itself; not of tokenizers that put a space in front
    of every text. Their documents are encoded whole.
    """
    tokenizer = text_encoder(definition)

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    pieces = re.split(r"(?<=\S)(?= \S)", PROBE)
    return ids(PROBE) == [token for piece in pieces for token in ids(piece)]


def _vocabulary(tokenizer: Tokenizer, where: str, named: dict) -> Vocabulary:
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def find(key: str, usual: tuple[str, ...]) -> int | None:
        said = named.get(key)
        said = said.get("content") if isinstance(said, dict) else said
        if said is not None and not isinstance(said, str):
            raise UserError(f"the tokenizer_config.json beside {where} has {said!r} as its {key}, not text; check it")
        ids = [tokenizer.token_to_id(token) for token in ([said] if said else usual)]
        return next((token_id for token_id in ids if token_id is not None), None)

    sink = SinkConfig("token").names[0]
    if tokenizer.token_to_id(sink) is not None:
        raise UserError(
            f"{where} has a {sink} already, as models have that were exported with one; each run adds its own, so give "
            "the tokenizer.json that its data was prepared with"
        )
    eos_id = find("eos_token", END_NAMES)
    if eos_id is None:
        raise UserError(
            f"{where} has no end-of-text token; name it as eos_token in a tokenizer_config.json beside it, "
            f"or add {END_OF_TEXT}"
        )
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if UNUSED.fullmatch(tokenizer.id_to_token(size - 1) or ""):  # of an exported model without a sink
        return _vocabulary(Tokenizer.from_str(without_unused(tokenizer.to_str())), where, named)
    return Vocabulary(tokenizer.to_str(), size, eos_id, find("pad_token", PADDING_NAMES))


def _download(name: str) -> tuple[Path, Path]:
    import huggingface_hub

    hub_token()  # one that can be sent, or none
    try:
        with quiet("huggingface_hub"):
            file = Path(huggingface_hub.hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # no network, no such repository, no such file: all end here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the tokenizer {name} is neither a file nor a Hub repository with a tokenizer.json that can be reached "
            f"({reason}); check the name or download it first"
        ) from None
    try:
        with quiet("huggingface_hub"):
            settings = Path(huggingface_hub.hf_hub_download(name, "tokenizer_config.json"))
    except Exception:  # it may have none
        settings = file.with_name("tokenizer_config.json")
    return file, settings
