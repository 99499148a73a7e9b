"""The tokenizer of a prepared folder: that of a model or a tokenizer.json, or a byte-level BPE trained here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sinkmodel.errors import UserError
from sinkmodel.text_tokenizer import END_OF_TEXT, PADDING, PROBE, text_encoder
from sinkmodel.tokenizer_loading import load_text_tokenizer

LONGEST_WORD = 1 << 12  # bytes; longer words are split, because each merge of the BPE training moves the rest of a word
SMALLEST_VOCABULARY = 256 + 2  # every byte and the two special tokens


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in the form that the shards need. `definition` is the content of its tokenizer.json."""

    definition: str
    size: int  # ids in use, special tokens included
    eos_id: int
    pad_id: int | None


def load_vocabulary(name: str) -> Vocabulary:
    """Load from a tokenizer.json, a folder with one, or any name that `load_model` takes, without the model's sinks.

    The end-of-text token is the one that its settings name, or a special token with a usual name. Raises UserError if
    there is no such token, or if the tokenizer is missing or broken.
    """
    text = load_text_tokenizer(name)
    if text.eos_id is None:
        raise UserError(
            f"{name} has no end-of-text token; name it as eos_token in a tokenizer_config.json beside its "
            f"tokenizer.json, or add {END_OF_TEXT}"
        )
    return Vocabulary(text.definition, text.vocabulary, text.eos_id, text.pad_id)


def train_vocabulary(texts: Iterable[str], size: int) -> Vocabulary:
    """Train a byte-level BPE of `size` ids like Pythia's: end of text is id 0, padding id 1, NFC, no added space.

    The same texts in the same order give the same tokenizer. If there is too little text, it has fewer ids. A word
    longer than LONGEST_WORD (DNA, blanks) is split for training, since the time for it grows with the square of its
    length. Encoding does not split it.
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
    return Vocabulary(tokenizer.to_str(), tokenizer.get_vocab_size(), eos_id=0, pad_id=1)


def cuts_exactly(definition: str) -> bool:
    """Whether text that is cut just before a lone space gives the same tokens as the whole text.

    True for byte-level BPE and all tokenizers that split there themselves. False for tokenizers that put a space in
    front of every text: their documents must be encoded whole.
    """
    tokenizer = text_encoder(definition)

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    pieces = re.split(r"(?<=\S)(?= \S)", PROBE)
    return ids(PROBE) == [token for piece in pieces for token in ids(piece)]
