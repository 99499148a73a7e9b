"""Streaming any family the slow, obvious way: one token at a time, every key turned from its raw form at every step.

The model itself is left as it is, and runs on one token with a stock `DynamicCache` that is filled again each time.
Nothing is kept but raw keys and values; rotation, frequencies and places are written out here, after StreamingLLM
section 3.2 and the families' own papers. Budget C counts the sinks and the current token: query t sees all t + 1 keys
while t < C, and afterwards the first S and the C − S latest.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

INTERLEAVED = {"gptj", "cohere"}  # pair i is (2i, 2i + 1); everywhere else it is (i, i + half)
NO_ROTATION = {"mpt"}  # ALiBi, by the place in the list of keys


def stream_logits(model, ids: list[int], budget: int, sinks: int, positions: str = "cache") -> torch.Tensor:
    """Logits [T, V] of every token of `ids`, each seeing the keys that the cache then holds."""
    stream = Stream(model, budget, sinks, positions)
    return torch.stack([stream.feed(token) for token in ids])


def greedy_ids(model, ids: list[int], budget: int, sinks: int, count: int, positions: str = "cache") -> list[int]:
    """The `count` likeliest ids after `ids`, one after the other."""
    stream = Stream(model, budget, sinks, positions)
    new: list[int] = []
    for token in ids:
        logits = stream.feed(token)
    while len(new) < count:
        new.append(int(logits.argmax()))
        logits = stream.feed(new[-1])
    return new


@torch.no_grad()
def fed(model, cache, ids, *sizes: int) -> torch.Tensor:
    """Logits [T, V] of one stream through the cache under test, fed in pieces of these sizes in turn."""
    pieces, at = [], 0
    while at < len(ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(model(torch.tensor([ids[at : at + size]]), past_key_values=cache).logits[0])
        at += size
    return torch.cat(pieces)


def held(cache) -> list[torch.Tensor]:
    """The buffers of the cache under test: keys and values of each layer, [B, G, slots, D]; none before it is fed."""
    return [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]


class Stream:
    """One stream, fed token by token. positions: "cache" (the place in the cache) or "text" (the index in the text)."""

    def __init__(self, model, budget: int, sinks: int, positions: str = "cache"):
        self.model, self.budget, self.sinks, self.positions = model, budget, sinks, positions
        self.seen = 0
        self.index: list[int] = []  # in the text, of each kept token
        self.raw: list[list[torch.Tensor]] = []  # [token][layer] → key [G, D], in fp64
        self.values: list[list[torch.Tensor]] = []

    @torch.no_grad()
    def feed(self, token: int) -> torch.Tensor:
        """Logits [V] after one more token."""
        self.index.append(self.seen)
        if len(self.index) > self.budget:  # the oldest that is no sink goes, before the query looks
            del self.index[self.sinks], self.raw[self.sinks], self.values[self.sinks]
        places = torch.tensor(self.places())
        cache = DynamicCache()
        for layer in range(self.model.config.num_hidden_layers if self.raw else 0):
            keys = torch.stack([kept[layer] for kept in self.raw], dim=1)  # [G, n − 1, D]
            values = torch.stack([kept[layer] for kept in self.values], dim=1)
            keys = rotate(self.model.config, layer, keys, places[:-1]).to(values.dtype)
            cache.update(keys[None], values[None], layer)
        own = {} if self.model.config.model_type in NO_ROTATION else {"position_ids": places[None, -1:]}
        logits = self.model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True, **own).logits
        added = [layer.keys[0, :, -1:] for layer in cache.layers]
        self.raw.append([rotate(self.model.config, i, k, places[-1:], back=True)[:, 0] for i, k in enumerate(added)])
        self.values.append([layer.values[0, :, -1] for layer in cache.layers])
        self.seen += 1
        return logits[0, -1]

    def places(self) -> list[int]:
        """The position of each kept token, the current one last."""
        if self.positions == "cache":
            return list(range(len(self.index)))
        # Attention sees differences alone, so the origin is free: it is moved when the text is so long that the fp32
        # angles of the model would suffer. The keys' own angles are computed in fp64.
        origin = self.index[-1] - 32 if self.index[-1] > 1000 else 0
        return [i - origin for i in self.index]

    def skip(self, count: int) -> None:
        """As if `count` tokens had been fed long ago: all tokens but the sinks have positions that much later."""
        self.seen += count
        self.index = [i if i < self.sinks else i + count for i in self.index]


def rotate(config, layer: int, x: torch.Tensor, places: torch.Tensor, back: bool = False) -> torch.Tensor:
    """RoPE of keys x [G, n, D] at `places` [n], in fp64; `back` takes it off again."""
    x = x.double()
    if config.model_type in NO_ROTATION or not has_rope(config, layer):
        return x
    frequencies, factor = rope(config)
    pairs = torch.arange(len(frequencies))
    first, second = (2 * pairs, 2 * pairs + 1) if config.model_type in INTERLEAVED else (pairs, pairs + len(pairs))
    a, b = x[..., first], x[..., second]
    angles = places[:, None] * frequencies  # [n, pairs]
    if back:
        angles, factor = -angles, 1 / factor
    out = x.clone()
    out[..., first] = factor * (a * angles.cos() - b * angles.sin())
    out[..., second] = factor * (b * angles.cos() + a * angles.sin())
    return out


def has_rope(config, layer: int) -> bool:
    return config.model_type != "smollm3" or config.no_rope_layers[layer] == 1


def rope(config) -> tuple[torch.Tensor, float]:
    """The inverse frequencies, one a pair, and the factor on what is rotated (YaRN has one).

    They are rounded to fp32, as in every model: at a distance of millions the rounding itself is a visible angle.
    """
    if config.model_type == "gptj":
        return inverse(10000, config.rotary_dim), 1.0
    settings = config.rope_parameters
    if settings["rope_type"] != "default":  # `dynamic` at its original length, which no budget may exceed
        frequencies, factor = ROPE_INIT_FUNCTIONS[settings["rope_type"]](config)
        return frequencies.double(), factor
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return inverse(settings["rope_theta"], int(size * settings.get("partial_rotary_factor", 1.0))), 1.0


def inverse(base: float, size: int) -> torch.Tensor:
    return (1.0 / base ** (torch.arange(0, size, 2).float() / size)).double()
