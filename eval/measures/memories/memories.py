"""What KV memories cost on the same prompts, in nats, bytes and time (`sink-eval memories`).

Every memory reads the same prompts of --prompt tokens and is then scored on the same --continue tokens, which are fed
to it (teacher forcing). The difference to dense is paired token by token. As in `verify`, it has an interval over texts
and an answer: equivalent, better, worse or undecided.

    dense                every key is kept
    window, sink         a StreamingCache of C slots, without sinks and with sinks
    recompute            nothing is kept: the last C tokens are read again for each token
    snapkv … gemfilter   C slots of the prompt in each KV head (`sinkmodel.memories`). Tokens after the prompt are added
                         to these; only h2o and tova stay at C
    snapkv-as-published  a separate set of slots for each query head, as in the paper's code: H/G times the memory
    h2o-as-published     the same; the published code has no heads that share keys
    namm                 the tokens that an evolved network (--artefact) keeps; it is measured together with five
                         controls of the same size (`eval.measures.memories.controls`)
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from typing import Any

from eval.measures.loading import load
from eval.measures.memories.choice import check_decides, check_memories, memory_maker, namm_rows
from eval.measures.memories.controls import KEEPS
from eval.measures.memories.forgotten import Forgotten
from eval.measures.memories.measure import Question, Side, measure
from eval.measures.memories.names import NAMM, STREAMS
from eval.measures.memories.readers import memory_reader, recompute_reader, stream_reader
from eval.measures.texts import read_texts
from eval.policies.options import BORROWED
from eval.policies.recompute import Recompute
from sinkmodel import StreamingCache
from sinkmodel.errors import UserError
from sinkmodel.loading import LoadedModel
from sinkmodel.memories import Dense
from sinkmodel.results.memories import MemoriesResult


def run(options: argparse.Namespace) -> MemoriesResult:
    """The result. `options` are those of `eval.commands.memories`."""
    _check(options)
    loaded = load(options)
    _check_model(options, loaded)
    question = Question(options.prompt, options.after, options.margin, options.level, options.seed, options.these_texts)
    forgotten = Forgotten(loaded.tokenizer, len(loaded.sink_ids))
    sides = sides_of(options, loaded, forgotten)
    length = options.prompt + options.after
    taken = None if options.prompts > 1 else length
    texts, documents = read_texts(loaded, options.text, length, taken, options.documents, "--prompt and --continue")
    rows = measure(loaded.model, sides, documents, len(loaded.sink_ids), question, options.prompts)
    return MemoriesResult(
        model=options.model,
        sink_ids=loaded.sink_ids,
        prompt=options.prompt,
        after=options.after,
        **{key: getattr(options, key) for key in ("sinks", "window", "positions", "layer", "artefact")},
        margin=options.margin,
        level=options.level,
        seed=options.seed,
        these_texts=options.these_texts,
        dtype=options.dtype,
        device=str(loaded.model.device),
        texts=texts,
        rows=rows,
        forgets=forgotten.table() if NAMM in options.memories else None,
    )


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for memories that cannot work with the options, before a model is loaded."""
    check_decides(options, options.memories, "--prompt", options.prompt)
    budgeted = [name for name in options.memories if name not in ("dense", NAMM)]
    for budget in options.budgets if budgeted else ():
        if budget > options.prompt:
            raise UserError(
                f"--budgets {budget} keeps every token of --prompt {options.prompt}; lower it, or raise --prompt"
            )
        if "recompute" in options.memories and options.stride > budget:
            raise UserError(f"--stride {options.stride} does not fit into --budgets {budget} of recompute; lower it")
        if "sink" in options.memories and options.sinks and options.sinks >= budget:
            raise UserError(f"--budgets {budget} holds only the --sinks {options.sinks} of sink; raise it")
    check_memories(options, [name for name in budgeted if name not in STREAMS])


def _check_model(options: argparse.Namespace, loaded: LoadedModel) -> None:
    end, fed = loaded.positions, len(loaded.sink_ids) + options.prompt + options.after - 1
    if end is not None and fed > end:
        raise UserError(
            f"--prompt and --continue take {fed} positions, and {loaded.name} was made for {end}; use {fed - end} fewer"
        )


# ------------------------------------------------------------------------------------------------------- what is read


def sides_of(options: argparse.Namespace, loaded: LoadedModel, forgotten: Any = None) -> list[Side]:
    """Dense first, then each memory at each budget. Raises UserError if one cannot be created, before any reading."""
    sides = [Side("dense", None, memory_reader(partial(Dense, loaded.model)), "everything")]
    for name in dict.fromkeys(options.memories):
        if name == NAMM:
            for row, make in namm_rows(options, loaded.model, forgotten).items():
                sides.append(Side(row, None, memory_reader(make), KEEPS[row]))
        elif name != "dense":
            sides += [_side(options, loaded, name, budget) for budget in sorted(set(options.budgets))]
    return sides


def _side(options: argparse.Namespace, loaded: LoadedModel, name: str, budget: int) -> Side:
    front = len(loaded.sink_ids)
    if name == "recompute":
        if options.stride > budget - front:
            raise UserError(f"--stride {options.stride} does not fit into a window of {budget - front}; lower it")
        policy = Recompute(front, budget, options.stride)
        return Side(name, budget, recompute_reader(policy, front), policy.keeps)
    if name in STREAMS:
        sinks = 0 if name == "window" else options.sinks or front or BORROWED
        stream = partial(_stream, loaded.model, budget, sinks, options.positions)
        stream()  # raises now if the model cannot be streamed
        return Side(name, budget, stream_reader(stream), f"the first {sinks} and the {budget - sinks} latest")
    make = memory_maker(options, loaded.model, name, budget)
    memory = make()
    return Side(name, budget, memory_reader(make), f"{memory.sinks} first, {memory.window} last, and the best others")


def _stream(model: Any, budget: int, sinks: int, positions: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "sinks=0")  # intended: this is the window
        return StreamingCache(model, budget, sinks, positions)
