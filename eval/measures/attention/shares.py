"""Where attention goes, in numbers: what one layer's maps say, as sums over sequences.

`alpha` is the sink metric of Gu et al. (arXiv 2410.10781, section 3.2): how much key k gets of the queries from its own
on. A head has a sink at k where α_k > ε, and the share of such (sequence, layer, head) is their Sink_k^ε.

A target is what may be a sink: `sink` is what the model has for it, tokens in front or one in the softmax, and `first`
the first text token. Shares are means over the queries behind the first text token, which all have somewhere else to
look: sink, first and rest are 1 together.

Shapes: B sequences, H heads in G groups of shared keys, T places, P first places of a map, D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sinkmodel.maps import Seen

MEASURED = ("sink_alpha", "sink_heads", "first_alpha", "first_heads", "sink_share", "first_share", "rest_share")
PEAK = ("largest", "largest_place", "largest_dimension", "median", "times_median", "massive")
PLACES = 10  # of which the metric is given one by one, as Gu et al.'s own code prints it
MAP = 16  # places of an averaged map, as in StreamingLLM's Figures 2 and 7
MASSIVE = 100.0, 1000.0  # Sun et al. (arXiv 2402.17762): above this, and this many times the median


def alpha(weights_BHTT: Tensor) -> Tensor:
    """α_k [B, H, T]: the mean over queries i ≥ k of A[i, k], the query at k with them."""
    T = weights_BHTT.shape[-1]
    return weights_BHTT.sum(-2) / torch.arange(T, 0, -1, device=weights_BHTT.device)


def shares(weights_BHTT: Tensor, sink_BHT: Tensor | None, sinks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Share of attention on sink, first text token and all the rest, each [B, H]; `sinks` tokens stand in front."""
    behind = slice(sinks + 1, None)
    mean_BHT = weights_BHTT[:, :, behind].mean(-2)
    sink = mean_BHT[..., :sinks].sum(-1)
    if sink_BHT is not None:
        sink = sink + sink_BHT[..., behind].mean(-1)
    return sink, mean_BHT[..., sinks], mean_BHT[..., behind].sum(-1)


def layer_sums(seen: Seen, sinks: int, epsilon: float) -> dict[str, Tensor]:
    """Sums over the B sequences of one layer; what is not there, as the α of a sink that a model lacks, has no entry.

    sink_alpha, first_alpha [H]; sink_heads, first_heads [H], in how many sequences it is above ε; sink_share,
    first_share, rest_share [H]; heads_by_place [H, T]; key_norm, value_norm [T], means over G; score, weight
    [H, P, P] and, of a sink in the softmax, sink_score, sink_weight [H, P]. Of several sink tokens the largest α
    counts.
    """
    alpha_BHT = alpha(seen.weights_BHTT)
    targets = {"first": alpha_BHT[..., sinks]}
    if seen.sink_BHT is not None:
        targets["sink"] = seen.sink_BHT.mean(-1)
    elif sinks:
        targets["sink"] = alpha_BHT[..., :sinks].amax(-1)
    sums = {}
    for name, alpha_BH in targets.items():
        sums[f"{name}_alpha"] = alpha_BH.sum(0)
        sums[f"{name}_heads"] = (alpha_BH > epsilon).sum(0)
    parts = shares(seen.weights_BHTT, seen.sink_BHT, sinks)
    sums |= {f"{name}_share": part.sum(0) for name, part in zip(("sink", "first", "rest"), parts)}
    sums["heads_by_place"] = (alpha_BHT > epsilon).sum(0)
    sums["key_norm"] = seen.key_BGTD.norm(dim=-1).mean(1).sum(0)
    sums["value_norm"] = seen.value_BGTD.norm(dim=-1).mean(1).sum(0)
    sums["score"] = seen.score_BHTT[..., :MAP, :MAP].sum(0)
    sums["weight"] = seen.weights_BHTT[..., :MAP, :MAP].sum(0)
    if seen.sink_BHT is not None and seen.sink_score_BHT is not None:
        sums["sink_score"] = seen.sink_score_BHT[..., :MAP].sum(0)
        sums["sink_weight"] = seen.sink_BHT[..., :MAP].sum(0)
    return sums


def largest(hidden_BTD: Tensor) -> Tensor:
    """[4]: the largest |activation| of all, its place and dimension, and the median |activation| of its sequence."""
    size_BN = hidden_BTD.float().abs().flatten(1)
    value_B, index_B = size_BN.max(-1)
    b_1 = value_B.argmax(dim=0, keepdim=True)  # [1]: an index of no dimension would be waited for
    place_1, dimension_1 = index_B[b_1] // hidden_BTD.shape[-1], index_B[b_1] % hidden_BTD.shape[-1]
    return torch.cat([value_B[b_1], place_1, dimension_1, size_BN[b_1].median(-1).values])


class Tally:
    """`layer_sums` and `largest` over any number of sequences, in the memory of one; nothing waits for the device."""

    def __init__(self, sinks: int, epsilon: float):
        self.sinks, self.epsilon = sinks, epsilon
        self.sequences = 0
        self.sums: dict[int, dict[str, Tensor]] = {}
        self.peaks: dict[int, Tensor] = {}

    def see(self, seen: Seen) -> None:
        """What `watch` shows of a layer."""
        new, old = layer_sums(seen, self.sinks, self.epsilon), self.sums.get(seen.layer, {})
        self.sums[seen.layer] = {name: x + old.get(name, 0) for name, x in new.items()}

    def end_batch(self, sequences: int, hidden: Sequence[Tensor]) -> None:
        """`hidden` [B, T, D] is what each layer reads."""
        self.sequences += sequences
        for layer, hidden_BTD in enumerate(hidden):
            new = largest(hidden_BTD)
            old = self.peaks.get(layer, new)
            self.peaks[layer] = torch.where(new[0] > old[0], new, old)

    def means(self) -> list[dict[str, Tensor]]:
        """Of each layer the means over sequences, in fp64 on the CPU, and `peak`, the [4] of `largest`."""
        fetched = {layer: {name: x.cpu().double() for name, x in sums.items()} for layer, sums in self.sums.items()}
        return [
            {"peak": self.peaks[layer].cpu().double(), **{name: x / self.sequences for name, x in sums.items()}}
            for layer, sums in sorted(fetched.items())
        ]


# ---------------------------------------------------------------------------------------------------- what is reported


def results(means: list[dict[str, Tensor]], sinks: int, own_keys: list[float | None]) -> dict[str, Any]:
    """`rows`, one a layer with its heads; `overall`; and `heads_by_place`, the metric of the first places one by one.

    `means` as `Tally.means` gives them, `own_keys` the norms of the keys of a sink in the softmax.
    """
    rows = [layer_row(layer, mean, sinks, own) for layer, (mean, own) in enumerate(zip(means, own_keys))]
    peak = max(rows, key=lambda row: row["largest"])
    overall = {name: _mean([row[name] for row in rows]) for name in MEASURED}
    overall |= {"largest_layer": peak["layer"], **{name: peak[name] for name in PEAK}}
    by_place = [mean["heads_by_place"][:, :PLACES].mean(0).tolist() for mean in means]
    return {
        "rows": rows,
        "overall": overall,
        "heads_by_place": [sum(of_layers) / len(by_place) for of_layers in zip(*by_place)],
    }


def layer_row(layer: int, mean: dict[str, Tensor], sinks: int, own_key: float | None) -> dict[str, Any]:
    """A row of the table, means over heads, and the same of each head. What the model has not is None.

    `largest` is the largest |activation| that the layer reads, with its place, dimension and ratio to the median of its
    sequence; `massive` after Sun et al. A sink in the softmax has a value of zero and perhaps a key of its own.
    """
    of_heads = {name: mean[name].tolist() for name in MEASURED if name in mean}
    if "sink_alpha" not in mean:
        del of_heads["sink_share"]
    count = len(of_heads["first_alpha"])
    of_heads = {name: of_heads.get(name, [None] * count) for name in MEASURED}
    largest, place, dimension, median = mean["peak"].tolist()
    times = largest / median if median else None  # JSON has no infinity
    row: dict[str, Any] = {"layer": layer, **{name: _mean(values) for name, values in of_heads.items()}}
    for name, own in (("key_norm", own_key), ("value_norm", 0.0)):
        norms_T = mean[name]
        row[f"{name}_sink"] = norms_T[:sinks].mean().item() if sinks else own if "sink_weight" in mean else None
        row[f"{name}_first"] = norms_T[sinks].item()
        row[f"{name}_rest"] = norms_T[sinks + 1 :].mean().item()
    peak = (largest, int(place), int(dimension), median, times)
    massive = largest > MASSIVE[0] and largest > MASSIVE[1] * median
    heads = [{"head": head, **{name: of_heads[name][head] for name in MEASURED}} for head in range(count)]
    return {**row, **dict(zip(PEAK, (*peak, massive))), "heads": heads}


def _mean(values: list[Any]) -> float | None:
    """None where the values are."""
    return None if None in values else sum(values) / len(values)


def born(shares_by_step: Sequence[tuple[int, float]], threshold: float) -> int | None:
    """The first step from which on every share is above the threshold; None where the last one is not."""
    step = None
    for at, share in reversed(shares_by_step):
        if not share > threshold:
            break
        step = at
    return step
