"""KV memories the slow, obvious way: one row without padding, whole attention matrices in fp64, keys in dicts.

A transformers model gives its weights, norms and RoPE table. Attention, positions, scores and eviction are written out
here, in no hurry and with no code of `sinkmodel`. Each forward is given position 0 for every token, at which RoPE is
the identity, so that `Reader.attend` receives queries and keys that are not rotated yet and rotates them itself.

    outcome = run(model, "snapkv", {"budget": 16, "window": 4}, prompt, continuation)

Common settings: `budget` (C), `sinks` (S, default 0), `window` (w), `positions` ("text" or "cache"); see `DEFAULTS`.
If more than C tokens are held at an eviction, these C stay: the first S of the row, the last w of the text, and of the
others those of highest score. Of equal scores the earlier position wins. Otherwise all tokens stay.

H query heads, G KV heads, R = H/G, N prompt tokens, D head size, V vocabulary, M tokens after the prompt.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.sinkmodel.memories.scores import JOIN, expected_attention, gemfilter, snapkv

DEFAULTS: dict[str, dict[str, Any]] = {
    "snapkv": {"window": 32, "kernel": 7, "pooling": "max", "group": "mean"},
    "h2o": {"window": None, "interval": 1, "group": "sum"},  # window: half of the budget
    "tova": {"window": 1, "interval": 1},
    "expected_attention": {
        "window": 0,
        "group": "mean",
        "n_sink": 4,
        "n_future_positions": 512,
        "use_covariance": True,
        "use_vnorm": True,
        "epsilon": 0.0,
    },
    "gemfilter": {"window": 0, "layer": None, "kernel": 5, "pooling": "avg"},
    "scored": {"window": 0, "score": None},
}


@dataclass
class Outcome:
    """What one row kept, and its logits in fp64.

    kept_after_prompt, kept_at_end: [layer][KV head], sorted text positions; [layer][query head] if the group rule is
        "as_published".
    prompt_logits: [V], after the last token of the prompt (GemFilter: after the last token that it read again).
    logits: [M, V], after each token of the continuation.
    gap: the smallest relative distance between the lowest score kept and the highest score dropped, over all
        evictions; inf if none was decided by unequal scores. If it is below the rounding of fp32, a test is luck.
    """

    kept_after_prompt: list[list[list[int]]]
    kept_at_end: list[list[list[int]]]
    prompt_logits: Tensor
    logits: Tensor
    gap: float


@torch.no_grad()
def run(model, method: str, settings: dict[str, Any], prompt: list[int], continuation: list[int]) -> Outcome:
    """The prompt in one forward with dense attention, one eviction at its end, then one token at a time.

    GemFilter reads the prompt, chooses C tokens of it, and reads these alone, at positions 0 … C − 1.
    """
    unknown = set(settings) - {"budget", "sinks", "positions", *DEFAULTS[method]}
    assert not unknown, f"{method} has no setting {unknown}"
    assert settings.get("group") != "as_published" or method in ("snapkv", "h2o")
    settings = {"sinks": 0, "positions": "text", **DEFAULTS[method], **settings}
    if settings["window"] is None:
        settings["window"] = settings["budget"] // 2
    model = copy.deepcopy(model).double().eval()
    reader = Reader(model, method, settings)
    text = list(range(len(prompt) + len(continuation)))  # the text position of each token that the reader is fed
    if method == "gemfilter":
        reader.feed(prompt)
        chosen, gap = keep(reader.chosen_by[settings["layer"]], settings, len(prompt) - 1)
        text = chosen + text[len(prompt) :]
        reader = Reader(model, method, settings, gaps=[gap])
        prompt = [prompt[p] for p in chosen]
    prompt_logits = reader.feed(prompt)[-1]
    after_prompt = reader.kept(text)
    logits = [reader.feed([token])[-1] for token in continuation]
    stacked = torch.stack(logits) if logits else prompt_logits.new_empty(0, len(prompt_logits))
    return Outcome(after_prompt, reader.kept(text), prompt_logits, stacked, min(reader.gaps, default=float("inf")))


@dataclass
class Head:
    """What a set of query heads reads: one KV head's, or with "as_published" a single query head's copy of it."""

    group: int  # the KV head
    readers: list[int]  # the query heads
    held: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # position → key [D] not rotated, value [D]


@dataclass
class Layer:
    heads: list[Head]
    sums: list[dict[int, float]]  # [query head], position → attention of all queries so far
    latest: list[dict[int, float]]  # [query head], position → attention of the latest query


@dataclass
class Reader:
    """One row on its way through a model: `feed` the prompt, then each token."""

    model: Any
    method: str
    settings: dict[str, Any]
    gaps: list[float] = field(default_factory=list)
    layers: dict[int, Layer] = field(default_factory=dict)
    chosen_by: dict[int, dict[int, float]] = field(default_factory=dict)  # GemFilter: layer → position → score
    seen: int = 0
    prompt: int = 0
    calls: int = 0
    turns: bool = True  # whether the layer at work has RoPE
    softcap: float | None = None  # of the layer at work

    def feed(self, ids: list[int]) -> Tensor:
        """Logits [len(ids), V]."""
        config = self.model.config
        config._attn_implementation_internal = "memories-reference"
        name = config._attn_implementation  # a model with a sink in its softmax insists on a name of its own
        before, self.calls = ALL_ATTENTION_FUNCTIONS.get(name), 0
        AttentionInterface.register(name, self.attend)
        try:
            zeros = torch.zeros(1, len(ids), dtype=torch.long)
            logits = self.model(input_ids=torch.tensor([ids]), position_ids=zeros, use_cache=False).logits[0]
        finally:
            if before is not None:
                AttentionInterface.register(name, before)
        assert self.calls == config.num_hidden_layers, "the model did not ask this attention function in every layer"
        self.seen += len(ids)
        self.prompt = self.prompt or len(ids)
        return logits

    def kept(self, text: list[int]) -> list[list[list[int]]]:
        layers = [self.layers[i] for i in sorted(self.layers)]
        return [[[text[p] for p in sorted(head.held)] for head in layer.heads] for layer in layers]

    def attend(
        self, module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs
    ) -> tuple[Tensor, None]:
        """What transformers calls in each layer: q [1, H, n, D], k and v [1, G, n, D] → [1, n, H, D]."""
        assert kwargs.get("s_aux") is None, "not handled"
        self.softcap = softcap
        assert (kwargs.get("sliding_window") or 1e9) >= self.seen + query.shape[2], "native windows are not handled"
        self.calls += 1
        self.turns = bool(getattr(module, "use_rope", True))
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        q, k = (self.plain(x[0]) for x in (query, key))
        step = self.step if self.prompt else self.read_prompt
        return step(module, q, k, value[0], scaling).transpose(0, 1)[None], None

    def read_prompt(self, module, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Dense attention of N tokens to each other, [H, N, D]; then the eviction."""
        queries, count = q.shape[:2]
        shared, places = queries // len(k), range(count)
        turned_q, turned_k = self.rotated(q, places), self.rotated(k, places)
        later = torch.ones(count, count, dtype=torch.bool).triu(1)
        attention, out = [], []
        for h in range(queries):
            scores = self.capped(scaling * turned_q[h] @ turned_k[h // shared].T).masked_fill(later, float("-inf"))
            attention.append(softmax(scores, sink_score(module, turned_q[h], h, shared, scaling)))
            out.append(attention[h] @ v[h // shared])
        size = 1 if self.settings.get("group") == "as_published" else shared
        sets = [list(range(first, first + size)) for first in range(0, queries, size)]
        heads = [Head(readers[0] // shared, readers) for readers in sets]
        for head in heads:
            head.held = {p: (k[head.group, p], v[head.group, p]) for p in places}
        sums = [dict(enumerate(a.sum(0).tolist())) for a in attention]
        latest = [dict(enumerate(a[-1].tolist())) for a in attention]
        layer = self.layers[module.layer_idx] = Layer(heads, sums, latest)
        scores = None
        if self.method == "snapkv":
            scores = snapkv(torch.stack(attention).tolist(), sets, self.settings)
        elif self.method == "expected_attention":
            future = self.rotation(range(count, count + self.settings["n_future_positions"]), q.shape[-1])
            scores = expected_attention(q, turned_k, v, future, scaling, self.settings)
        elif self.method == "scored":
            scores = self.settings["score"](turned_k[None], v[None])[0].tolist()
        elif self.method == "gemfilter":
            self.chosen_by[module.layer_idx] = gemfilter(turned_q[:, -1], turned_k, self.settings)
        self.evict(layer, count - 1, scores)
        return torch.stack(out)

    def step(self, module, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Attention [H, 1, D] of one token to what each head holds and to itself; at each interval an eviction."""
        layer, now = self.layers[module.layer_idx], self.seen
        out = torch.empty_like(q)
        for head in layer.heads:
            head.held[now] = (k[head.group, 0], v[head.group, 0])
            positions = sorted(head.held)
            places = positions if self.settings["positions"] == "text" else range(len(positions))
            keys = self.rotated(torch.stack([head.held[p][0] for p in positions]), places)
            values = torch.stack([head.held[p][1] for p in positions])
            for h in head.readers:
                query = self.rotated(q[h], places[-1:])
                sink = sink_score(module, query, h, len(q) // len(k), scaling)
                weights = softmax(self.capped(scaling * query @ keys.T), sink)[0]
                out[h, 0] = weights @ values
                layer.latest[h] = dict(zip(positions, weights.tolist()))
                for p, weight in layer.latest[h].items():
                    layer.sums[h][p] = layer.sums[h].get(p, 0.0) + weight
        if "interval" in self.settings and (now + 1 - self.prompt) % self.settings["interval"] == 0:
            self.evict(layer, now)
        return out

    def evict(self, layer: Layer, newest: int, scores: list[list[float]] | None = None) -> None:
        """Down to the budget in each head. `scores` [head][position] are those of a prompt; H2O and TOVA have none."""
        everyone = [h for head in layer.heads for h in head.readers]
        for i, head in enumerate(layer.heads):
            if self.method == "h2o":
                join = JOIN.get(self.settings["group"], JOIN["mean"])  # "as_published": sets of one
                score = {p: join([layer.sums[h][p] for h in head.readers]) for p in head.held}
            elif self.method == "tova":
                score = {p: fmean(layer.latest[h][p] for h in everyone) for p in head.held}
            elif scores is not None:
                score = dict(enumerate(scores[i]))
            else:
                continue
            kept, gap = keep(score, self.settings, newest)
            self.gaps.append(gap)
            head.held = {p: head.held[p] for p in kept}

    def capped(self, scores: Tensor) -> Tensor:
        """Gemma2's cap of scores: nearly linear around 0, and never beyond ± `softcap`."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def plain(self, x: Tensor) -> Tensor:
        """x as before RoPE: at position 0 it turns nothing, but YaRN's factor has multiplied the rotary dimensions."""
        if not self.turns:
            return x
        factor = self.table([0])[0][0]
        return torch.cat([x[..., : len(factor)] / factor, x[..., len(factor) :]], dim=-1)

    def table(self, places) -> tuple[Tensor, Tensor]:
        """The model's own cos and sin [n, rotary dimensions] at `places`, with its rounding of angles in fp32."""
        cos, sin = self.model.base_model.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.tensor([list(places)]))
        return cos[0], sin[0]

    def rotated(self, x: Tensor, places) -> Tensor:
        """x [..., n, D] at `places` [n]: dimension i turns with dimension i + half, for the first 2 · half ones."""
        if not self.turns:
            return x
        cos, sin = self.table(places)
        half = cos.shape[-1] // 2
        cos, sin = cos[:, :half], sin[:, :half]
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    def rotation(self, places, size: int) -> Tensor:
        """The mean over `places` of the matrix [D, D] that rotates a column."""
        rows = [self.rotated(torch.eye(size, dtype=torch.float64), [place] * size) for place in places]
        return torch.stack(rows).mean(0).T


def softmax(scores: Tensor, sink: Tensor | None) -> Tensor:
    """Over the last dimension; a sink in the softmax is one more column, which is dropped afterwards."""
    if sink is None:
        return torch.softmax(scores, dim=-1)
    return torch.softmax(torch.cat([scores, sink[:, None]], dim=-1), dim=-1)[..., :-1]


def sink_score(module, query: Tensor, h: int, shared: int, scaling: float) -> Tensor | None:
    """Score [n] of a sink in the softmax for rotated queries [n, D] of head h; None if the model has no such sink."""
    kind = (getattr(module.config, "sink", None) or {}).get("kind")
    if kind == "zero":
        return query.new_zeros(len(query))
    if kind == "logit":
        return module.sink[h].expand(len(query))
    if kind == "kv_bias":
        return scaling * query @ module.sink[h // shared]
    return None


def keep(score: dict[int, float], settings: dict[str, Any], newest: int) -> tuple[list[int], float]:
    """Sorted positions that stay, of those with a score; and the relative gap at the cut, inf if scores did not decide.

    newest: the position of the last token of the text; the last w tokens are those after `newest` − w.
    """
    budget, sinks = settings["budget"], max(settings["sinks"], settings.get("n_sink", 0))
    if len(score) <= budget:
        return sorted(score), float("inf")
    forced = [p for p in score if p < sinks or p > newest - settings["window"]]
    assert len(forced) <= budget, "the budget is below sinks + window"
    free = sorted((p for p in score if p not in forced), key=lambda p: (-score[p], p))
    chosen, dropped = free[: budget - len(forced)], free[budget - len(forced) :]
    gap = float("inf")
    if chosen and score[chosen[-1]] != score[dropped[0]]:
        gap = (score[chosen[-1]] - score[dropped[0]]) / max(abs(score[chosen[-1]]), abs(score[dropped[0]]))
    return sorted(forced + chosen), gap
