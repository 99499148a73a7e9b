"""Made-up text, a tokenizer for it, and a prepared folder: random, offline, quick. The tests use them too."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sinkmodel.fingerprint import fingerprint_of
from sinkmodel.tokenizer import TextTokenizer


def words(count: int, seed: int = 0) -> str:
    """Text of `count` words with some structure: a few hundred made-up words, the likely ones often."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 8))) for _ in range(300)]
    chosen = rng.choices(vocabulary, weights=[1 / (i + 1) for i in range(300)], k=count)
    return " ".join(word + ("." if rng.random() < 0.1 else "") for word in chosen)


@functools.lru_cache
def tokenizer(vocabulary: int = 300) -> TextTokenizer:
    """A byte-level BPE with eos 0 and padding 1, as Pythia's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [words(5000)],
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<|endoftext|>", "<|padding|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return TextTokenizer(backend.to_str(), eos_id=0, pad_id=1)


def prepared(
    folder: Path, train_words: int = 4000, validation_words: int = 800, text: TextTokenizer | None = None
) -> Path:
    """A prepared folder, written by hand in the format of recipes.data.shards."""
    text = text or tokenizer()
    backend = text.backend()
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(text.definition, encoding="utf-8")
    splits = {}
    for name, count in (("train", train_words), ("validation", validation_words), ("test", 0)):
        ids = np.array(
            [*backend.encode(words(count, seed=len(name)), add_special_tokens=False).ids, 0] if count else [],
            dtype="<u2",
        )
        shards = []
        if count:
            (folder / f"{name}-00000.bin").write_bytes(ids.tobytes())
            digest = hashlib.sha256(ids.tobytes()).hexdigest()
            shards = [{"file": f"{name}-00000.bin", "tokens": len(ids), "documents": 1, "sha256": digest}]
        splits[name] = {
            "tokens": len(ids),
            "documents": bool(count),
            "dtype": "uint16",
            "row_tokens": None,
            "shards": shards,
        }
    sha256 = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    manifest = {
        "format": "sinkmodel-tokens",
        "version": 1,
        "tokenizer": {
            "file": "tokenizer.json",
            "sha256": sha256,
            "vocabulary": text.vocabulary,
            "eos_id": 0,
            "pad_id": 1,
        },
        "splits": splits,
        "fingerprint": fingerprint_of(sha256, splits),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder
