"""Chunked scoring with three attentions for its window: today's blocks, flex, and flash. The fastest is named.

    blocks   `sinkmodel.band` as it is: scaled_dot_product_attention in fp32 with a bias, 64 queries at a time
    flex     FlexAttention with a block mask of the band, compiled
    flash    PyTorch's flash kernel with its own sliding window

flex and flash compute the window alone, in the model's dtype, and return its log-sum-exp. The columns of the sinks are
added in fp32: with lse' = log(e^lse + Σ e^s), y = o · e^(lse − lse') + Σ e^(s − lse') v. Losses are compared with
those of blocks. Nothing here is used outside of this measurement: whichever wins on a GPU can move into `band`.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from bench.gpu.machine import DEVICE, DTYPE, KERNEL, device_name, free, shape_file, sized
from eval.measures.shape import load_shape
from sinkmodel import scoring
from sinkmodel.band import Band
from sinkmodel.scoring import streaming_nll
from sinkmodel.softmax_sinks.scores import sink_scores

SHAPE = shape_file("pythia-160m")
BUDGETS, SINKS = sized([256, 1024], [24]), 4
DOCUMENTS, LENGTH = sized(8, 2), sized(16_384, 150)
CHUNKS = sized([256, 1024], [32])  # queries of a document in one forward
ROUNDS = sized(5, 1)
BOUND = sized(0.05, 1e-3)  # largest difference of the mean loss from that of blocks, in nats; on a GPU in bf16

WindowAttention = Callable[[Tensor, Tensor, Tensor, int, float], tuple[Tensor, Tensor]]  # y and lse, heads first


def flex(q_BHND: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    mask = _band(q_BHND.shape[2], k_BGKD.shape[2], window)
    shared = q_BHND.shape[1] != k_BGKD.shape[1]
    aux = AuxRequest(lse=True)
    y, found = _flex()(q_BHND, k_BGKD, v_BGKD, block_mask=mask, scale=scale, enable_gqa=shared, return_aux=aux)
    return y, found.lse


@functools.cache
def _flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, **KERNEL)


@functools.lru_cache(maxsize=8)
def _band(N: int, K: int, window: int) -> Any:
    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + (K - N) - key
        return (distance >= 0) & (distance < window)

    return create_block_mask(seen, None, None, N, K, device=DEVICE)


def flash(q_BHND: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    aten, (N, K) = torch.ops.aten, (q_BHND.shape[2], k_BGKD.shape[2])
    if q_BHND.device.type == "cuda":
        q, k, v = (x.transpose(1, 2) for x in (q_BHND, k_BGKD, v_BGKD))  # a window is aligned with the last key
        sides = {"window_size_left": window - 1, "window_size_right": 0}
        y, lse, *_ = aten._flash_attention_forward(q, k, v, None, None, N, K, 0.0, False, False, scale=scale, **sides)
        return y.transpose(1, 2), lse
    distance_NK = torch.arange(K - N, K)[:, None] - torch.arange(K)  # the CPU's kernel has a mask, and no window
    bias = torch.zeros(N, K).masked_fill_((distance_NK < 0) | (distance_NK >= window), float("-inf")).to(q_BHND.dtype)
    k, v = (x.repeat_interleave(q_BHND.shape[1] // x.shape[1], dim=1) for x in (k_BGKD, v_BGKD))
    return aten._scaled_dot_product_flash_attention_for_cpu(q_BHND, k, v, 0.0, False, attn_mask=bias, scale=scale)


def attend_with(window_attention: WindowAttention) -> Callable[..., Tensor]:
    """A method for `Band.attend`: [B, N, H, D] from a window's attention and the columns of the sinks."""

    def attend(band: Band, module: Any, q_BHND: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, scale: float) -> Tensor:
        band.called.append(band.current)
        layer, (H, N) = band.layers[band.current], q_BHND.shape[1:3]
        score_BHNF = band._sink_scores(q_BHND.float(), layer.sink_keys.float(), scale)
        v_BGFD = layer.sink_values.float()
        own_BHN = sink_scores(module, q_BHND.float(), scale, band.to_cache)
        front = score_BHNF.shape[-1]
        if own_BHN is not None:
            score_BHNF, v_BGFD = torch.cat([score_BHNF, own_BHN[..., None]], dim=-1), F.pad(v_BGFD, (0, 0, 0, 1))
            front += 1
        k_BGKD, v_BGKD = k_BGKD[:, :, front:], v_BGKD[:, :, front:]
        alone = max(0, min(N, band.sinks - band.start))  # queries that are sinks see no key of the window
        y_BHND = q_BHND.new_zeros(*q_BHND.shape[:3], v_BGKD.shape[-1], dtype=torch.float32)
        lse_BHN = torch.full(q_BHND.shape[:3], float("-inf"), device=q_BHND.device)
        if alone < N:
            y, lse = window_attention(q_BHND[:, :, alone:], k_BGKD, v_BGKD, band.window, scale)
            y_BHND[:, :, alone:], lse_BHN[:, :, alone:] = y.float(), lse.float()
        total_BHN1 = torch.cat([lse_BHN[..., None], score_BHNF], dim=-1).logsumexp(dim=-1, keepdim=True)
        v_BHFD = v_BGFD.repeat_interleave(H // v_BGFD.shape[1], dim=1)
        y_BHND = y_BHND * (lse_BHN[..., None] - total_BHN1).exp() + (score_BHNF - total_BHN1).exp() @ v_BHFD
        return y_BHND.transpose(1, 2).to(q_BHND.dtype)

    return attend


SIDES: dict[str, Callable[..., Tensor]] = {
    "blocks": Band.attend,
    "flex": attend_with(flex),
    "flash": attend_with(flash),
}


@contextlib.contextmanager
def replaced(attend: Callable[..., Tensor], rows: int) -> Iterator[None]:
    """Score with this attention, and as many queries in one forward."""
    before = Band.attend, scoring.ROWS_AT_ONCE
    Band.attend, scoring.ROWS_AT_ONCE = attend, rows  # type: ignore[method-assign]
    try:
        yield
    finally:
        Band.attend, scoring.ROWS_AT_ONCE = before  # type: ignore[method-assign]


def measure() -> dict[str, Any]:
    model = load_shape(SHAPE, DTYPE, DEVICE).model
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    documents = torch.randint(0, vocabulary, (DOCUMENTS, LENGTH), generator=generator).tolist()
    rows = [compare(model, documents, budget, chunk) for budget in BUDGETS for chunk in CHUNKS]
    free()
    return {"rows": rows}


def compare(model: Any, documents: list[list[int]], budget: int, chunk: int) -> dict[str, Any]:
    """Tokens/s of each side, in turns; what flex and flash change of the mean loss."""
    free()  # flex is compiled for each shape, of which dynamo takes eight
    speeds: dict[str, list[float]] = {name: [] for name in SIDES}
    losses: dict[str, float] = {}
    for turn in range(ROUNDS + 1):
        for name, attend in SIDES.items():
            with replaced(attend, DOCUMENTS * chunk):
                started = time.perf_counter()
                nll = torch.cat(streaming_nll(model, documents, budget, SINKS, chunk))  # on the host: it has ended
                seconds = time.perf_counter() - started
            losses[name] = nll.mean().item()
            if turn:
                speeds[name].append(len(nll) / seconds)
    for name, loss in losses.items():
        if not abs(loss - losses["blocks"]) < BOUND:
            raise RuntimeError(f"{name} gives {loss:.4f} nats per token and blocks {losses['blocks']:.4f}")
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = {name: statistics.median(a / b for a, b in zip(x, speeds["blocks"])) for name, x in speeds.items()}
    return {"budget": budget, "chunk": chunk, "tokens_per_second": medians, "ratios": ratios, "nll": losses}


def show(result: dict[str, Any]) -> str:
    lines = []
    for row in result["rows"]:
        sides = ", ".join(f"{name} {x:,.0f} tokens/s" for name, x in row["tokens_per_second"].items())
        best = max(row["ratios"], key=row["ratios"].get)
        lines.append(
            f"scoring, {SHAPE.stem} in {DTYPE}, {SINKS}+{row['budget'] - SINKS}, chunks of {row['chunk']}: "
            f"{best} is the fastest, {row['ratios'][best]:.2f}× blocks ({sides}) on {device_name()}"
        )
    return "\n".join(lines)
