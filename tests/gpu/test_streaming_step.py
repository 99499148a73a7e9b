"""Risk: a step of a StreamingCache is compiled again and again, or runs without CUDA graphs, and loses its speed."""

from __future__ import annotations

import torch

from bench.gpu.decoding import graphs
from bench.gpu.machine import DEVICE, sized
from sinkmodel.cache import StreamingCache
from tests.models import build, tokens

BUDGET, SINKS = sized(48, 16), 4  # of the model's 64 positions, which are renumbered every 2 × BUDGET tokens
STEPS = 4 * BUDGET
BOUND = 1e-3  # of logits between 1 and 10, fp32 on both sides


@torch.no_grad()
def fed(run, cache, ids: list[int], device: str) -> torch.Tensor:
    """Logits [T, V] of one token after the other, on the host: a CUDA graph writes over its last output."""
    steps = torch.tensor(ids, device=device)[:, None, None]
    return torch.cat([run(input_ids=step, past_key_values=cache).logits[0].cpu() for step in steps])


def test_a_compiled_step_is_compiled_once_and_gives_the_logits_of_the_cpu():
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    ids = tokens(STEPS)
    model = build("llama")
    expected = fed(model, StreamingCache(model.config, BUDGET, SINKS), ids, "cpu")
    model = build("llama").to(DEVICE)
    run, cache = graphs(model), StreamingCache(model.config, BUDGET, SINKS)
    graphs_before, skipped = counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]
    start = fed(run, cache, ids[:3], DEVICE)
    assert counters["stats"]["unique_graphs"] == graphs_before + 1, "the whole model is one graph"
    with torch._dynamo.config.patch(error_on_recompile=True):
        went_on = fed(run, cache, ids[3:], DEVICE)
    assert counters["stats"]["unique_graphs"] == graphs_before + 1
    assert counters["inductor"]["cudagraph_skips"] == skipped, "CUDA graphs were not used"
    assert (torch.cat([start, went_on]) - expected).abs().max() < BOUND
    assert expected.abs().max() > 1
