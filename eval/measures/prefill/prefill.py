"""The cost of reading a prompt with each KV memory, and of the answer's steps after it (`sink-eval latency --prefill`).

    dense                transformers' own cache, which keeps everything
    snapkv … gemfilter   C slots of the prompt in each KV head (`sinkmodel.memories`)
    snapkv-as-published  a separate set of slots for each query head, as in the paper's code; also h2o-as-published

GemFilter saves time on the prompt, the others on the steps after it. So for each pair the answer length is reported at
which the side with the earlier first token falls behind. `measure` takes the times, `crossover` does the arithmetic.
The prompt has random tokens, since the cost does not depend on their content.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

from eval.measures.loading import device_name, load
from eval.measures.memories.choice import check_decides, namm_rows
from eval.measures.memories.names import NAMM, PUBLISHED
from eval.measures.meters import PeakMemory
from eval.measures.prefill.measure import Side, dense_side, measure
from eval.measures.shape import config_of, load_shape, read_shape
from eval.measures.timing import BLOCK
from eval.policies.policy import end_of
from sinkmodel.console import say
from sinkmodel.errors import UserError
from sinkmodel.loading import LoadedModel
from sinkmodel.memories import make_memory
from sinkmodel.model_support import own_window
from sinkmodel.results.latency import ENOUGH, Crossover, PrefillResult, PrefillRow
from sinkmodel.scoring import check_decoder


def run(options: argparse.Namespace) -> PrefillResult:
    """The result. `options` are those of `eval.commands.prefill`, with the defaults filled in."""
    check_decides(options, options.memories, "--length", min(options.length))
    if options.rounds < ENOUGH:
        say(f"--rounds {options.rounds}: fewer than {ENOUGH} rounds give no interval")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.shape is not None:  # check before making the weights, which may take long
        shape = read_shape(options.shape)
        _check_length(options, f"{options.shape}", shape.positions, 0)
        sides_of(options, config_of(shape))
    loaded = load(options) if options.shape is None else load_shape(options.shape, options.dtype, options.device)
    _check_model(options, loaded)
    rows: list[PrefillRow] = []
    crossovers: list[Crossover] = []
    lengths = sorted(set(options.length))
    for place, length in enumerate(lengths, 1):
        sides = sides_of(options, loaded.model)
        label = f"{place}/{len(lengths)} prompt {length}"
        new_rows, pairs = measure(loaded, sides, length, sorted(set(options.answers)), options.rounds, label)
        rows, crossovers = rows + new_rows, crossovers + pairs
    return PrefillResult(
        model=loaded.name,
        dtype=options.dtype,
        device=device_name(loaded),
        threads=torch.get_num_threads(),
        weights_bytes=sum(p.nbytes for p in loaded.model.parameters()),
        rounds=options.rounds,
        rows=rows,
        crossovers=crossovers,
    )


def _check_length(options: argparse.Namespace, name: str, end: int, front: int) -> None:
    fed = front + max(options.length) + max(options.answers) + BLOCK
    if fed > end:
        raise UserError(
            f"--length {max(options.length)} and --answers {max(options.answers)} take {fed} positions with the timed "
            f"steps, and {name} has {end}; use {fed - end} fewer"
        )


def _check_model(options: argparse.Namespace, loaded: LoadedModel) -> None:
    check_decoder(loaded.model, cached=True)
    sides_of(options, loaded.model)
    ends = (loaded.positions, end_of(loaded.model), own_window(loaded.model.config.get_text_config()))
    if known := [end for end in ends if end is not None]:
        _check_length(options, loaded.name, min(known), len(loaded.sink_ids))
    if not PeakMemory(loaded.model.device).forgets:
        say("this system cannot reset a process's peak memory: peaks are those of the whole run so far")


def sides_of(options: argparse.Namespace, model_or_config: Any) -> list[Side]:
    """Dense first, then each memory at each budget. Raises UserError if one of them cannot be created."""
    sides = [dense_side()]
    for name in dict.fromkeys(options.memories):
        settings: dict[str, Any] = {"group": "as_published"} if name in PUBLISHED else {}
        if name == "gemfilter" and options.layer is not None:
            settings["layer"] = options.layer
        if name == NAMM:
            sides += [Side(row, None, make) for row, make in namm_rows(options, model_or_config).items()]
        for budget in sorted(set(options.budgets)) if name not in ("dense", NAMM) else ():
            make = partial(make_memory, PUBLISHED.get(name, name), model_or_config, budget, **settings)
            try:
                make()
            except UserError as error:
                raise UserError(f"{name} at --budgets {budget}: {error}") from None
            sides.append(Side(name, budget, make))
    return sides
