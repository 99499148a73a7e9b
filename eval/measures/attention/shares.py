"""Where attention goes, in numbers: statistics of each layer's attention maps, summed over sequences.

α and the sink metric are those of `sinkmodel.sink_metric`: a head has a sink at key k if α_k > ε.

A target is a place that may be a sink. `sink` is the model's own sink: tokens in front of the text, or a column of the
softmax. `first` is the first text token. Shares are means over the queries after the first text token, since each of
these has another text token to attend to. The shares of sink, first and rest add up to 1.

Shapes: B sequences, H heads in G groups of shared keys, T positions, P the first positions of a map, D dimensions of a
head (or of the hidden states).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sinkmodel.attention_maps import Seen
from sinkmodel.results.attention import PEAK, SHARES, Head, LayerRow, Overall
from sinkmodel.sink_metric import alpha, sink_alpha

PLACES = 10  # first positions for which the metric is reported one by one, as Gu et al.'s own code prints it
MAP = 16  # positions of an averaged map, as in StreamingLLM's Figures 2 and 7
MASSIVE = 100.0, 1000.0  # Sun et al. (arXiv 2402.17762): above this value, and above this many times the median


def shares(weights_BHTT: Tensor, sink_BHT: Tensor | None, sinks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Share of attention on the sink, the first text token and all the rest, each [B, H].

    Args:
        sink_BHT: what each query gives to a sink in the softmax; None for a model without one.
        sinks: number of sink tokens before the text.
    """
    after_first = slice(sinks + 1, None)
    mean_BHT = weights_BHTT[:, :, after_first].mean(-2)
    sink = mean_BHT[..., :sinks].sum(-1)
    if sink_BHT is not None:
        sink = sink + sink_BHT[..., after_first].mean(-1)
    return sink, mean_BHT[..., sinks], mean_BHT[..., after_first].sum(-1)


def layer_sums(seen: Seen, sinks: int, epsilon: float) -> dict[str, Tensor]:
    """Sums over the B sequences of one layer. A quantity that the model lacks, such as the sink's α, has no entry.

    The entries: sink_alpha, first_alpha [H]; sink_heads, first_heads [H], the number of sequences with α > ε;
    sink_share, first_share, rest_share [H]; heads_by_place [H, T]; key_norm, value_norm [T], means over G; score,
    weight [H, P, P]; and for a sink in the softmax sink_score, sink_weight [H, P].
    """
    alpha_BHT = alpha(seen.weights_BHTT)
    targets = {"first": alpha_BHT[..., sinks]}
    own_BH = sink_alpha(seen, alpha_BHT, sinks)
    if own_BH is not None:
        targets["sink"] = own_BH
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
    """[4]: the largest |activation| of all, its position and dimension, and the median |activation| of its sequence."""
    size_BN = hidden_BTD.float().abs().flatten(1)
    value_B, index_B = size_BN.max(-1)
    b_1 = value_B.argmax(dim=0, keepdim=True)  # [1]: indexing with a 0-d tensor would synchronise with the device
    place_1, dimension_1 = index_B[b_1] // hidden_BTD.shape[-1], index_B[b_1] % hidden_BTD.shape[-1]
    return torch.cat([value_B[b_1], place_1, dimension_1, size_BN[b_1].median(-1).values])


class Tally:
    """Accumulates `layer_sums` and `largest` over any number of batches, in constant memory, without device syncs."""

    def __init__(self, sinks: int, epsilon: float):
        self.sinks, self.epsilon = sinks, epsilon
        self.sequences = 0
        self.sums: dict[int, dict[str, Tensor]] = {}
        self.peaks: dict[int, Tensor] = {}

    def see(self, seen: Seen) -> None:
        """Add the maps of one layer; a callback for `watch`."""
        new, old = layer_sums(seen, self.sinks, self.epsilon), self.sums.get(seen.layer, {})
        self.sums[seen.layer] = {name: x + old.get(name, 0) for name, x in new.items()}

    def end_batch(self, sequences: int, hidden: Sequence[Tensor]) -> None:
        """Add the hidden states [B, T, D] that each layer reads, and count the batch's sequences."""
        self.sequences += sequences
        for layer, hidden_BTD in enumerate(hidden):
            new = largest(hidden_BTD)
            old = self.peaks.get(layer, new)
            self.peaks[layer] = torch.where(new[0] > old[0], new, old)

    def means(self) -> list[dict[str, Tensor]]:
        """For each layer the means over sequences, in fp64 on the CPU, and `peak`, the [4] of `largest`."""
        fetched = {layer: {name: x.cpu().double() for name, x in sums.items()} for layer, sums in self.sums.items()}
        return [
            {"peak": self.peaks[layer].cpu().double(), **{name: x / self.sequences for name, x in sums.items()}}
            for layer, sums in sorted(fetched.items())
        ]


# ---------------------------------------------------------------------------------------------------- what is reported


def results(
    means: list[dict[str, Tensor]], sinks: int, own_keys: list[float | None]
) -> tuple[list[LayerRow], Overall, list[float]]:
    """A row for each layer with its heads; the means over layers; and the metric at each of the first positions.

    Args:
        means: what `Tally.means` returns.
        own_keys: for each layer the norm of the key of a sink in the softmax; None without such a key.
    """
    rows = [layer_row(layer, mean, sinks, own) for layer, (mean, own) in enumerate(zip(means, own_keys))]
    peak = max(rows, key=lambda row: row.largest or 0.0)
    fields: dict[str, Any] = {name: _mean([row.shares[name] for row in rows]) for name in SHARES}
    fields |= {name: getattr(peak, name) for name in PEAK}
    overall = Overall(**fields, largest_layer=peak.layer)
    by_place = [mean["heads_by_place"][:, :PLACES].mean(0).tolist() for mean in means]
    return rows, overall, [sum(of_layers) / len(by_place) for of_layers in zip(*by_place)]


def layer_row(layer: int, mean: dict[str, Tensor], sinks: int, own_key: float | None) -> LayerRow:
    """A row of the table: means over heads, and the values of each head. A quantity that the model lacks is None.

    A sink in the softmax has a value of zero and may have a key of its own.
    """
    of_heads = {name: mean[name].tolist() for name in SHARES if name in mean}
    if "sink_alpha" not in mean:
        del of_heads["sink_share"]
    count = len(of_heads["first_alpha"])
    of_heads = {name: of_heads.get(name, [None] * count) for name in SHARES}
    norms: dict[str, float | None] = {}
    for name, own in (("key_norm", own_key), ("value_norm", 0.0)):
        norms_T = mean[name]
        norms[f"{name}_sink"] = norms_T[:sinks].mean().item() if sinks else own if "sink_weight" in mean else None
        norms[f"{name}_first"] = norms_T[sinks].item()
        norms[f"{name}_rest"] = norms_T[sinks + 1 :].mean().item()
    largest, place, dimension, median = mean["peak"].tolist()
    return LayerRow(
        layer=layer,
        **{name: _mean(values) for name, values in of_heads.items()},
        **norms,
        largest=largest,
        largest_place=int(place),
        largest_dimension=int(dimension),
        median=median,
        times_median=largest / median if median else None,  # JSON has no infinity
        massive=largest > MASSIVE[0] and largest > MASSIVE[1] * median,
        heads=[Head(head=head, **{name: of_heads[name][head] for name in SHARES}) for head in range(count)],
    )


def _mean(values: list[Any]) -> float | None:
    """The mean, or None if any value is None."""
    return None if None in values else sum(values) / len(values)
