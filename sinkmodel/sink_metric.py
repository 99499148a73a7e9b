"""The sink metric of Gu et al. (arXiv 2410.10781, section 3.2). Training and `sink-eval sinks` both compute it here.

    α_k       = mean over the queries i ≥ k of A[i, k], the attention that key k gets in a head
    Sink_k^ε  = share of all sequences, layers and heads in which α_k > ε

The query at k is included. For a sink in the softmax, α is the mean share that all queries give to it. With several
sink tokens, the largest α counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from sinkmodel.attention_maps import Seen

EPSILON = 0.3  # ε of Gu et al.: a head whose α is above it has a sink
LENGTH = 64  # T of Gu et al.: tokens of a sequence
BORN = 0.05  # share of heads with a sink above which the sink counts as born

# Columns of metrics.csv, with names for people. Runs of earlier versions have the old ones.
COLUMNS = {"sink_alpha": "α of the sink", "sink_metric": "share of heads with a sink"}
OLD_COLUMNS = {
    "sink_share": "share of attention on the sink (old definition)",
    "sink_heads": "share of heads with a sink (old definition)",
}
OLD_DEFINITION = "old definition: a mean over the queries after the sinks, where α includes the query at the sink"


def alpha(weights_BHTT: Tensor) -> Tensor:
    """α_k [B, H, T]: the mean over queries i ≥ k of A[i, k], including the query at k."""
    import torch

    T = weights_BHTT.shape[-1]
    return weights_BHTT.sum(-2) / torch.arange(T, 0, -1, device=weights_BHTT.device)


def sink_alpha(seen: Seen, alpha_BHT: Tensor, sinks: int) -> Tensor | None:
    """α of the model's own sink in one layer, [B, H]; None if the model has no sink.

    Args:
        alpha_BHT: the `alpha` of the layer's attention weights.
        sinks: number of sink tokens in front of the text.
    """
    if seen.sink_BHT is not None:
        return seen.sink_BHT.mean(-1)
    return alpha_BHT[..., :sinks].amax(-1) if sinks else None


def measure_sink(model: Any, ids_BT: Tensor, sinks: int) -> Tensor:
    """The mean α of the sink and its metric Sink^ε with ε = EPSILON: [2], on the device of the model.

    The sink is the model's own; for a model without one it is the first token. Rows are cut to LENGTH tokens.
    """
    import torch

    from sinkmodel.attention_maps import watch

    of_layers: list[Tensor] = []

    def see(seen: Seen) -> None:
        alpha_BHT = alpha(seen.weights_BHTT)
        own_BH = sink_alpha(seen, alpha_BHT, sinks)
        of_layers.append(alpha_BHT[..., 0] if own_BH is None else own_BH)

    watch(model, ids_BT[:, :LENGTH], see)
    alpha_LBH = torch.stack(of_layers)
    return torch.stack([alpha_LBH.mean(), (alpha_LBH > EPSILON).float().mean()])


def born(shares_by_step: Sequence[tuple[int, float]], threshold: float) -> int | None:
    """The first step from which every share is above the threshold; None if the last share is not."""
    step = None
    for at, share in reversed(shares_by_step):
        if not share > threshold:
            break
        step = at
    return step


def old_columns(names: Iterable[str]) -> list[str]:
    """Those columns of a metrics.csv that have the old definition."""
    return [name for name in names if name in OLD_COLUMNS]
