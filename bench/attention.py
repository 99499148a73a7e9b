"""The cost of a sink in the softmax: forward and backward of one layer, compared with PyTorch's causal kernel.

    python -m bench.attention [--rows N] [--heads 12] [--length N] [--size 64] [--rounds 30]

`renormalised` is `sinkmodel.softmax_sinks.attention` (the same kernel, with its result and its backward pass
corrected). `column` is one more key and a mask with `scaled_dot_product_attention`. `flex` is FlexAttention with its
lse, compiled (GPU only, since it has no backward pass on a CPU). bf16 on a GPU, fp32 on a CPU. The sides alternate.
Each line is a ratio of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkmodel.softmax_sinks.attention import _with_column, attend


def flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    masks: dict[int, object] = {}

    def side(q: Tensor, k: Tensor, v: Tensor, score_BHT: Tensor, scale: float) -> Tensor:
        T = q.shape[2]
        if T not in masks:
            masks[T] = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=q.device)
        out, lse = compiled(q, k, v, block_mask=masks[T], scale=scale, return_lse=True)
        return out * torch.sigmoid(lse - score_BHT)[..., None].to(out.dtype)

    return side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=None, help="default: 16 on a GPU, 1 on a CPU")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--length", type=int, default=None, help="default: 2048 on a GPU, 512 on a CPU")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    shape = options.rows or (16 if gpu else 1), options.heads, options.length or (2048 if gpu else 512), options.size
    q, k, v, grad = (torch.randn(shape, device=device, dtype=dtype, requires_grad=i < 3) for i in range(4))
    score_BHT = torch.randn(shape[:3], device=device, requires_grad=True)
    scale = options.size**-0.5
    sides: dict[str, Callable[[], Tensor]] = {
        "causal kernel, no sink": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale),
        "renormalised": lambda: attend(q, k, v, score_BHT, None, scale),
        "column": lambda: _with_column(q, k, v, score_BHT, None, scale),
    }
    compiled = torch.compile(attend)
    sides["renormalised, compiled"] = lambda: compiled(q, k, v, score_BHT, None, scale)
    if gpu:
        by_flex = flex()
        sides["flex"] = lambda: by_flex(q, k, v, score_BHT, scale)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.rounds + 3):
        for name, side in sides.items():
            start = now(gpu)
            side().backward(grad)
            if turn >= 3:
                seconds[name].append(now(gpu) - start)
    base = statistics.median(seconds["causal kernel, no sink"])
    print(f"attention {'×'.join(map(str, shape))} in {dtype} on {device}: causal kernel {base * 1e3:.2f} ms")
    for name, values in seconds.items():
        print(f"  {name}: {statistics.median(values) / base:.2f}")


def now(gpu: bool) -> float:
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
