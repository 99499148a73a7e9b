"""The cost of a decoding step under each cache policy, once the cache is full (`sink-eval latency`).

Like StreamingLLM's Figure 10, but the policies take their steps in turns (`eval.measures.timing`). At a budget C

    dense      transformers' growing cache, holding C keys; it is cut back to this size after every step
    recompute  a forward over the last C tokens for each new token, with only the last position's logits
    window     a StreamingCache of C slots, without sinks
    sink       a StreamingCache of C slots, S of them for sinks

so every query sees C keys. There is one stream of random tokens, since the cost does not depend on their content.
"""

from __future__ import annotations

import argparse

import torch

from eval.measures.loading import device_name, load
from eval.measures.meters import PeakMemory
from eval.measures.shape import load_shape
from eval.measures.timing import along_stream, measure
from eval.policies.choice import choose
from eval.policies.options import BORROWED, check
from eval.policies.policy import end_of, refuse_narrower_window
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.loading import LoadedModel
from sinkmodel.results.latency import LatencyResult, LatencyRow, Ratio, StreamRow
from sinkmodel.sinks import IN_SOFTMAX, kind_of


def run(options: argparse.Namespace, points: int) -> LatencyResult:
    """The result.

    Args:
        options: those of `eval.commands.latency`.
        points: number of positions along --stream-length at which steps are timed.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loaded = load(options) if options.shape is None else load_shape(options.shape, options.dtype, options.device)
    front = len(loaded.sink_ids)
    # StreamingLLM keeps four tokens for a model without its own sink.
    sinks = options.sinks or front or (0 if kind_of(loaded.model.config) in IN_SOFTMAX else BORROWED)
    check([sinks, front], min(options.budgets), "--budgets")
    configurations = {
        budget: choose(options.policies, [sinks], budget, front) for budget in sorted(set(options.budgets))
    }
    _check_model(loaded, max(configurations))
    rows: list[LatencyRow] = []
    ratios: list[Ratio] = []
    for index, (budget, policies) in enumerate(configurations.items(), 1):
        label = f"{index}/{len(configurations)} budget {budget}"
        new_rows, new_ratios = measure(loaded, policies, budget, options.tokens, label)
        rows, ratios = rows + new_rows, ratios + new_ratios
    stream: list[StreamRow] = []
    if options.stream_length is not None:
        for budget, policies in configurations.items():
            for policy in policies:
                if policy.name in ("window", "sink"):
                    stream += along_stream(loaded, policy, budget, options.stream_length, points, options.tokens)
    return LatencyResult(
        model=loaded.name,
        dtype=options.dtype,
        device=device_name(loaded),
        threads=torch.get_num_threads(),
        rows=rows,
        ratios=ratios,
        stream=stream,
    )


def _check_model(loaded: LoadedModel, budget: int) -> None:
    refuse_narrower_window(loaded.model, budget)
    end = end_of(loaded.model)
    if end is not None and budget > end:
        raise UserError(
            f"--budgets {budget} is too large: {loaded.name} keeps its rotary frequencies only up to {end}; "
            f"use --budgets {end} or less"
        )
    if not PeakMemory(loaded.model.device).forgets:
        say("this system cannot reset a process's peak memory: peaks are those of the whole run so far")
    if loaded.positions is not None and budget > loaded.positions:
        say(
            f"{loaded.name} was made for {loaded.positions} positions: at larger --budgets its times are valid, its "
            "predictions are not"
        )
