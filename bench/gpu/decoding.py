"""A decoding step with a full StreamingCache beside transformers' caches: eager, and compiled with CUDA graphs.

Both sides are one function, `torch.compile(model, mode="reduce-overhead")`, as transformers compiles for a StaticCache.
Random weights, in bf16 on a GPU; the sides take turns step by step, and the ratio is one of medians (`bench.decoding`).
"""

from __future__ import annotations

import statistics
from types import SimpleNamespace
from typing import Any

import torch

from bench.decoding import alternate, dynamic, moving, ratio, static, streaming
from bench.gpu.machine import DEVICE, DTYPE, STEP, device_name, free, shape_file, sized
from eval.measures.shape import load_shape

SHAPES = [shape_file(name) for name in sized(["pythia-160m", "llama-8b"], ["one"])]
BUDGETS = sized([1024, 4096], [24])
SINKS = 4
ROUNDS, WARM_UP = sized(100, 2), sized(8, 1)  # CUDA graphs are recorded in the second step


@torch.no_grad()
def measure() -> dict[str, Any]:
    rows = []
    for shape in SHAPES:
        model = load_shape(shape, DTYPE, DEVICE).model
        for budget in BUDGETS:
            rows += [
                {"shape": shape.stem, "budget": budget, **compare(model, budget, how)} for how in ("eager", "graphs")
            ]
        del model
        free()
    return {"rows": rows}


def compare(model: Any, budget: int, how: str) -> dict[str, Any]:
    """Medians in ms, and ours as a ratio to the faster of transformers' caches."""
    free()
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    run = graphs(model) if how == "graphs" else model
    ours, cache = streaming(model, run, budget, SINKS)
    sides = {"StreamingCache": ours, "StaticCache": static(model, run, budget)}
    if how == "eager":
        sides["DynamicCache"] = dynamic(model, run, budget)
    taken = alternate(sides, ROUNDS, warm_up=WARM_UP, device=DEVICE)
    share = moving(cache) / (2 * budget)  # positions are renumbered once in 2C steps, none of which is timed
    taken["StreamingCache"] = [x + share for x in taken["StreamingCache"]]
    ms = {name: statistics.median(x) for name, x in taken.items()}
    fastest = min((name for name in ms if name != "StreamingCache"), key=lambda name: ms[name])
    return {
        "how": how,
        "ms": ms,
        "fastest": fastest,
        "ratio": ratio(taken, "StreamingCache", fastest),
        "skipped": torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] - skipped,
    }


def graphs(model: Any) -> Any:
    """The compiled model. Each call is a step of its own for CUDA graphs; the next call reuses its memory."""
    compiled = torch.compile(model, **STEP)

    def run(**inputs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return SimpleNamespace(logits=compiled(**inputs).logits)

    return run


def show(result: dict[str, Any]) -> str:
    lines = []
    for row in result["rows"]:
        budget, ms = row["budget"], ", ".join(f"{name} {x:.2f} ms" for name, x in row["ms"].items())
        warning = f"; CUDA graphs were not used {row['skipped']} times" if row["skipped"] else ""
        lines.append(
            f"decoding, {row['shape']} in {DTYPE}, {row['how']}, {SINKS}+{budget - SINKS}: StreamingCache takes "
            f"{row['ratio']} {row['fastest']} ({ms}) on {device_name()}{warning}"
        )
    return "\n".join(lines)
