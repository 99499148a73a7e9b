"""Small things that many tests need: a tokenizer, a text, a training checkpoint. Random, offline, quick."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sinkmodel.checkpoint import PREFIX, Recipe
from sinkmodel.models import build_model
from sinkmodel.shapes import ModelShape
from sinkmodel.sinks import SinkConfig, padded_vocabulary, write_sink
from sinkmodel.tokenizer import TextTokenizer

SHAPES = {
    "gpt_neox": ModelShape(layers=2, hidden=32, heads=4, kv_heads=4, ffn=64, positions=128),
    "llama": ModelShape("llama", layers=2, hidden=32, heads=4, kv_heads=2, ffn=64, positions=128, rotary_pct=1.0),
}


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


def sentencepiece(pre_tokenizer: bool = False) -> TextTokenizer:
    """As Llama 2: BPE that falls back to bytes, blanks as `▁`, one in front of a text, `<s>` from a template."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    backend.train_from_iterator(words(3000).split(), trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    backend = Tokenizer.from_str(json.dumps(content))
    if pre_tokenizer:  # the same cuts, written in another way
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextTokenizer(backend.to_str(), eos_id=2)


def checkpoint(
    folder: Path,
    architecture: str | ModelShape = "gpt_neox",
    sink: SinkConfig | None = None,
    step: int = 7,
    text: TextTokenizer | None = None,
) -> Path:
    """A file as sink-pretrain writes it, with random weights; biases and norms random too, so that none is idle."""
    sink = sink or SinkConfig("token")
    text = text or tokenizer()
    shape = SHAPES[architecture] if isinstance(architecture, str) else architecture
    model = build_model(shape, padded_vocabulary(text.vocabulary), 3, sink)
    generator = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    write_sink(model.config, sink, sink.ids(text.vocabulary))
    recipe = Recipe(model.config.to_dict(), sink, text, step, 1000 * step, {"data": {"fingerprint": "f00d"}})
    path = folder / "checkpoints" / f"step{step}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {PREFIX + name: value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "recipe": recipe.to_dict()}, path)
    return path


def prepared(
    folder: Path, train_words: int = 4000, validation_words: int = 800, text: TextTokenizer | None = None
) -> Path:
    """A prepared folder, written by hand in the format of recipes.data.shards."""
    from sinkmodel.fingerprint import fingerprint_of

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
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
