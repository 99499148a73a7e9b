"""The two sides of MFU: floating-point operations per token, and the peak rate of the device."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedModel

from sinkmodel.models import count_parameters, head_of
from sinkmodel.products import matmul

# Dense bf16 tensor-core peaks in FLOP/s, from NVIDIA's data sheets; the first name contained in the device's counts.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def flops_per_token(model: PreTrainedModel, sequence: int) -> float:
    """6 · (parameters that multiply) + 12 · layers · hidden · T: forward and backward of one token.

    Frozen parameters count 4 times instead of 6: they get no gradients of their own. The output head is counted, the
    input embedding is not. Attention is counted over all T keys, as is customary (PaLM, arXiv 2204.02311, appendix B).
    Pythia-160M at T = 2,048: 0.968 GFLOP.
    """
    _, body = count_parameters(model)
    config = model.config.get_text_config()
    times = 6 if head_of(model).weight.requires_grad else 4
    return (
        times * (body + head_of(model).weight.numel()) + 12 * config.num_hidden_layers * config.hidden_size * sequence
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s: from the data sheet for bf16 on a known GPU, else measured with matrix products in `dtype`."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS.items():
            if known in name:
                return peak
    size, best = (8192 if device.type == "cuda" else 1024), 0.0
    a = torch.randn(size, size, device=device, dtype=dtype)
    until = time.perf_counter() + 0.5  # long enough to include a quiet moment of a shared machine
    while (start := time.perf_counter()) < until:
        matmul(a, a).sum().item()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
