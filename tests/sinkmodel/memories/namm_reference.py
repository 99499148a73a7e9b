"""NAMM the slow, obvious way: one row, one token at a time in fp64, every attention that was ever paid is kept.

    outcome = run(model, settings, parameters, ids)

`settings` are those of the published method under its own names: `n_fft`, `hop`, `delay` (tokens between decisions),
`coefficient` (γ), `code` (numbers of the age code), `base`, `hidden`, `mean`, `variance`, `fill`. Formulas are those of
SakanaAI/evo-memory, block by block: `torch.stft` on each token's column of a block, with the last n_fft − hop values of
the block before in front, then the weighted sum over frames and what is left of the earlier blocks.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.sinkmodel.memories.reference import Reader

Place = tuple[int, int]  # layer, KV head


@dataclass
class Decision:
    """What one head decided: positions of what it held, their features [K, F] and scores [K], and those that stayed."""

    positions: list[int]
    features: Tensor
    scores: Tensor
    stayed: list[int]


@dataclass
class Outcome:
    logits: Tensor  # [N, V] in fp64
    decisions: dict[Place, list[Decision]]
    kept: list[list[list[int]]]  # [layer][KV head], sorted positions at the end

    @property
    def gap(self) -> float:
        """The smallest absolute score of all decisions: if it is below the rounding of fp32, a test is luck."""
        return min(d.scores.abs().min().item() for each in self.decisions.values() for d in each)


@torch.no_grad()
def run(model, settings: dict[str, Any], parameters: Tensor, ids: list[int]) -> Outcome:
    reader = NAMMReader(copy.deepcopy(model).double().eval(), "namm", {"positions": "text"})
    reader.namm, reader.parameters = settings, parameters.double()
    logits = torch.stack([reader.feed([token])[-1] for token in ids])
    return Outcome(logits, reader.decisions, reader.kept(list(range(len(ids)))))


@dataclass
class NAMMReader(Reader):
    namm: dict[str, Any] = field(default_factory=dict)
    parameters: Tensor = field(default_factory=lambda: torch.zeros(0))
    columns: dict[Place, dict[int, list[float]]] = field(default_factory=dict)  # position → attention of each query
    averages: dict[Place, dict[int, Tensor]] = field(default_factory=dict)  # position → moving average [bins]
    decisions: dict[Place, list[Decision]] = field(default_factory=dict)

    def read_prompt(self, module, q, k, v, scaling):
        out = super().read_prompt(module, q, k, v, scaling)
        self.look(module.layer_idx, 0)
        return out

    def step(self, module, q, k, v, scaling):
        now, out = self.seen, super().step(module, q, k, v, scaling)
        self.look(module.layer_idx, now)
        return out

    def look(self, index: int, now: int) -> None:
        """Write down the attention of the query at `now`; decide if it is the last one of a block."""
        layer = self.layers[index]
        for g, head in enumerate(layer.heads):
            columns = self.columns.setdefault((index, g), {})
            for p in head.held:
                paid = [layer.latest[h][p] for h in head.readers]
                columns.setdefault(p, [0.0] * now).append(sum(paid) / len(paid))
        if (now + 1) % self.namm["delay"] == 0:
            self.decide(index, now)

    def decide(self, index: int, now: int) -> None:
        heads = self.layers[index].heads
        made = [self.judge((index, g), sorted(head.held), now) for g, head in enumerate(heads)]
        most = max(len(each.stayed) for each in made)
        for g, (head, each) in enumerate(zip(heads, made)):
            if self.namm["fill"]:
                score = dict(zip(each.positions, each.scores.tolist()))
                score[now] = float("inf")
                each.stayed = sorted(sorted(score, key=lambda p: -score[p])[:most])
            head.held = {p: head.held[p] for p in each.stayed}
            for numbers in (self.columns[index, g], self.averages[index, g]):
                for p in set(numbers) - set(each.stayed):
                    del numbers[p]
            self.decisions.setdefault((index, g), []).append(each)

    def judge(self, place: Place, positions: list[int], now: int) -> Decision:
        features = torch.stack([self.features(place, p, now) for p in positions])
        scores = self.network(features)
        stayed = [p for p, score in zip(positions, scores.tolist()) if score >= 0 or p == now]
        return Decision(positions, features, scores, stayed)

    def features(self, place: Place, position: int, now: int) -> Tensor:
        """The age code, then the normalised moving average."""
        n_fft, hop, delay = (self.namm[name] for name in ("n_fft", "hop", "delay"))
        column = self.columns[place][position]
        assert len(column) == now + 1
        before = ([0.0] * n_fft + column[:-delay])[-(n_fft - hop) :] if n_fft > hop else []
        signal = torch.tensor(before + column[-delay:], dtype=torch.float64)
        window = torch.hann_window(n_fft, periodic=True, dtype=torch.float64)
        frames = torch.stft(signal, n_fft, hop, window=window, center=False, onesided=True, return_complex=True).abs()
        rate, count = self.namm["coefficient"] ** hop, frames.shape[1]
        average = sum((1 - rate) * rate ** (count - 1 - i) * frames[:, i] for i in range(count))
        averages = self.averages.setdefault(place, {})
        if position in averages:
            average = average + self.namm["coefficient"] ** delay * averages[position]
        averages[position] = average
        half, age = self.namm["code"] // 2, now - position
        angles = [age / self.namm["base"] ** (i / half) for i in range(half)]
        code = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        deviation = torch.tensor(self.namm["variance"], dtype=torch.float64).sqrt()
        spectrum = (average - torch.tensor(self.namm["mean"], dtype=torch.float64)) / deviation
        return torch.cat([torch.tensor(code, dtype=torch.float64), spectrum])

    def network(self, x: Tensor) -> Tensor:
        """Scores [K] of features [K, F], token by token."""
        F, hidden = x.shape[1], self.namm["hidden"]
        sizes = [F * 3 * hidden, 3 * hidden, hidden * 2 * F, 2 * F, F, 1]
        w_qkv, b_qkv, w_out, b_out, w, b = self.parameters.split(sizes)
        qkv = x @ w_qkv.view(F, 3 * hidden) + b_qkv
        scores = []
        for j in range(len(x)):
            q, keys, values = qkv[j, :hidden], qkv[j:, hidden : 2 * hidden], qkv[j:, 2 * hidden :]
            attended = torch.softmax(keys @ q / hidden**0.5, dim=0) @ values
            out = attended @ w_out.view(hidden, 2 * F) + b_out
            y = x[j] * (1 + out[F:]) + out[:F]
            scores.append(y @ w + b[0])
        return torch.stack(scores)
