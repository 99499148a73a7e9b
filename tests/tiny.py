"""Small things that many tests need: a tokenizer, a text, a training checkpoint. Random, offline, quick."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bench.made_up import prepared, tokenizer, words
from sinkmodel.bases import Base, freeze, grow, start_rows
from sinkmodel.checkpoint import PREFIX, Recipe
from sinkmodel.loading import load_base
from sinkmodel.models import build_model
from sinkmodel.shapes import ModelShape
from sinkmodel.sinks import SinkConfig, padded_vocabulary, write_sink
from sinkmodel.tokenizer import TextTokenizer, tokenizer_settings
from tests.models import build

__all__ = ["prepared", "tokenizer", "words"]  # of bench, beside what is below
SHAPES = {
    "gpt_neox": ModelShape(layers=2, hidden=32, heads=4, kv_heads=4, ffn=64, positions=128),
    "llama": ModelShape("llama", layers=2, hidden=32, heads=4, kv_heads=2, ffn=64, positions=128, rotary_pct=1.0),
}


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
    model: Any = None,
    base: Base | None = None,
    **more,
) -> Path:
    """A file as sink-pretrain writes it, with random weights; biases and norms random too, so that none is idle.

    Args:
        model: one with room for the sinks (`based`), in place of one that is built here.
        base: what it started from.
        more: of the recipe.
    """
    sink = sink or SinkConfig("token")
    text = text or tokenizer()
    if model is None:
        shape = SHAPES[architecture] if isinstance(architecture, str) else architecture
        model = build_model(shape, padded_vocabulary(text.vocabulary), 3, sink)
        generator = torch.Generator().manual_seed(9)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    if not text.front:
        write_sink(model.config, sink, sink.ids(text.vocabulary))
    provenance = {"data": {"fingerprint": "f00d"}, **more.pop("provenance", {})}
    recipe = Recipe(model.config.to_dict(), sink, text, step, 1000 * step, provenance, base, **more)
    return _save(folder, dict(model.state_dict()), recipe)


def based(family: str, sink: SinkConfig | None = None, text: TextTokenizer | None = None, free: int = 0, **changes):
    """A model of somebody else's (`tests.models.build`) with room for the sinks; it had `free` rows of no token."""
    sink, text = sink or SinkConfig("token"), text or tokenizer()
    model = build(family, vocab_size=text.vocabulary + free, **changes)
    grow(model, text.vocabulary, sink.tokens)
    start_rows(model, text.vocabulary, sink.tokens, "random")
    return model


def base_folder(
    folder: Path, family: str = "llama", text: TextTokenizer | None = None, license: str | None = None, **changes
) -> Path:
    """A model folder of somebody else's, with tokenizer and, if asked, a card that names its licence."""
    text = text or tokenizer()
    model = build(family, **{"vocab_size": text.vocabulary, **changes})
    model.generation_config.pad_token_id = None
    model.save_pretrained(folder)
    settings = tokenizer_settings(text, SinkConfig(), 64)
    (folder / "tokenizer.json").write_text(text.definition, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": None}), encoding="utf-8")
    if license is not None:
        (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n# A base\n", encoding="utf-8")
    return folder


def partial_checkpoint(
    folder: Path, base: Path | str, parts: str = "sink", sink: SinkConfig | None = None, step: int = 7, **more
) -> Path:
    """A checkpoint that holds only what was trained on top of a base: rows of the sinks, perhaps norms, all random."""
    sink, text = sink or SinkConfig("token"), more.pop("text", None) or tokenizer()
    loaded, record = load_base(str(base))
    model, first = loaded.model, text.vocabulary
    grow(model, first, sink.tokens)
    start_rows(model, first, sink.tokens, None)
    freeze(model, parts, first, sink.tokens)
    generator = torch.Generator().manual_seed(9)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in trained.values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    write_sink(model.config, sink, sink.ids(first))
    provenance = {"data": {"fingerprint": "f00d"}, "git_commit": "0a1b2c3d", **more.pop("provenance", {})}
    fields = {"base": record, "parts": parts, **more}
    recipe = Recipe(model.config.to_dict(), sink, text, step, 1000 * step, provenance, **fields)
    return _save(folder, {name: parameter.detach() for name, parameter in trained.items()}, recipe)


def _save(folder: Path, weights: dict[str, torch.Tensor], recipe: Recipe) -> Path:
    path = folder / "checkpoints" / f"step{recipe.step}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {PREFIX + name: value for name, value in weights.items()}
    torch.save({"state_dict": state, "recipe": recipe.to_dict()}, path)
    return path


@functools.lru_cache
def llama_2_tokenizer() -> TextTokenizer:
    """A BPE with byte fallback that puts `<s>` in front, as Llama 2's."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = [*"▁abcdefghijklmnopqrstuvwxyz.", "▁a", "▁b", "th", "▁th", "an", "▁an", "er", "in", "▁in"]
    vocabulary = {name: number for number, name in enumerate([*names, *letters])}
    merges = [("▁", "a"), ("▁", "b"), ("t", "h"), ("▁", "th"), ("a", "n"), ("▁", "an"), ("e", "r"), ("i", "n")]
    model = models.BPE(vocabulary, [*merges, ("▁", "in")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return TextTokenizer(backend.to_str(), eos_id=2)
