"""The cost of KV memories compared with dense attention: reading a prompt, and a decoding step after it.

    python -m bench.memories [--layers 8] [--prompt 4096] [--budget 1024] [--rounds 5]
    python -m bench.memories --prompt 8192 --memories namm-512 namm-128

Each line is a ratio of CPU times to those of transformers' DynamicCache in the same run, through the same products
(`sinkmodel.products`). The sides alternate, on one thread. Random weights in SmolLM2-135M's shape with fewer layers,
fp32; the ratios of NAMM hardly depend on the number of layers.

    prefill    reading the prompt and compressing it, with the logits of its last token
    decode     a step with the budget's keys, compared with a step of a DynamicCache that holds as many
    ideal      for GemFilter: (r + 1)/L of dense's prefill plus a prefill of the budget
    namm       decides every 512 tokens, as in the paper, or every 128, as the artefact `namm-recall`. It has parameters
               with which each head keeps about half of the prompt; the kept share is printed. The parts of its time are
               those of one more reading
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bench.ratios import of_rounds
from sinkmodel.memories import GemFilter, make_memory
from sinkmodel.memories.namm import NAMM, NAMMConfig, measure_statistics, split
from sinkmodel.memories.namm import memory as namm_memory
from sinkmodel.products import fast_products

NAMES = ("snapkv", "tova", "expected-attention", "h2o", "gemfilter")
NAMMS = {"namm-512": 512, "namm-128": 128}  # tokens between two decisions
STEPS = 16


def smollm2(layers: int, positions: int) -> PreTrainedModel:
    """SmolLM2-135M's shape with `layers` layers and a small vocabulary, so that the head takes little time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=positions,  # h2o and tova keep text positions, which grow
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def read(model: PreTrainedModel, ids: torch.Tensor, cache: object) -> None:
    with fast_products():  # our own caches use it, so dense must
        model(ids, past_key_values=cache, logits_to_keep=1)


def reader(model: PreTrainedModel, name: str, budget: int, ids: torch.Tensor) -> Callable[[], object]:
    """A function that reads the prompt with a new memory and returns the memory."""

    def run() -> object:
        memory = make_memory(name, model, budget)
        memory.expect(ids.shape[1])
        read(model, ids, memory)
        return memory

    return run


def dense(model: PreTrainedModel, ids: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        cache = DynamicCache()
        read(model, ids, cache)
        return cache

    return run


def seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def in_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            took = seconds(run)
            if number:
                times[name].append(took)
    return times


def show(label: str, ours: list[float], theirs: list[float], at_most: float | None = None) -> None:
    demanded = "" if at_most is None else f", demanded: at most {at_most:.2f}"
    print(f"{label:32} {of_rounds(ours, theirs)}{demanded}", flush=True)


# ---------------------------------------------------------------------------------------------------------------- NAMM


def parameters_for_half(config: NAMMConfig, prompt: int) -> torch.Tensor:
    """Parameters with which a token stays until its age is about half of the prompt's length.

    Its score is the slowest cosine of its age, less the cosine of half the prompt, plus a tenth of one bin of its
    spectrum. So each head keeps other tokens. All parts of the network are computed, as with any parameters.
    """
    half = config.age_size // 2
    rate = config.age_base ** -((half - 1) / half)
    parameters = torch.zeros(config.parameters)
    tensors = split(parameters, config.features, config.hidden)
    tensors["score.weight"][config.age_size - 1] = 1.0
    tensors["score.weight"][config.age_size + 4] = 0.1
    tensors["score.bias"][:] = -math.cos(prompt / 2 * rate)
    return parameters


def namm_readers(model: PreTrainedModel, names: list[str], ids: torch.Tensor) -> dict[str, Callable[[], NAMM]]:
    """For each name a function that reads the prompt with a new NAMM and returns it."""

    def side(config: NAMMConfig) -> Callable[[], NAMM]:
        def run() -> NAMM:
            memory = NAMM(model, config, parameters)
            read(model, ids, memory)
            return memory

        return run

    measured = measure_statistics(model, [ids]) if names else NAMMConfig()
    parameters = parameters_for_half(measured, ids.shape[1])
    return {name: side(measured.replace(interval=NAMMS[name])) for name in names}


@contextlib.contextmanager
def timed(owner: Any, name: str) -> Iterator[list[float]]:
    """In the block, a function of a module or class is replaced by one that notes the seconds of each call."""
    taken: list[float] = []
    function = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        result = function(*args, **kwargs)
        taken.append(time.process_time() - started)
        return result

    with mock.patch.object(owner, name, run):
        yield taken


def show_parts(name: str, read_namm: Callable[[], NAMM], whole: float, attention_of_dense: float) -> None:
    """Print what share of the prompt a NAMM keeps, and the seconds of its parts divided by those of dense's prefill."""
    with contextlib.ExitStack() as stack:
        attend, hops, scores, evict = (
            stack.enter_context(timed(owner, part))
            for owner, part in ((NAMM, "attend"), (namm_memory, "add_hop"), (NAMM, "_scores"), (NAMM, "_evict"))
        )
        memory = read_namm()
    kept = [len(tokens) for layer in range(len(memory.layers)) for tokens in memory.kept_positions(layer)]
    parts = {
        "attention with its weights": sum(attend) - sum(hops),
        "spectra": sum(hops),
        "scores": sum(scores),
        "eviction": sum(evict) - sum(scores),
    }
    shown = ", ".join(f"{part} {taken / whole:.2f}" for part, taken in parts.items())
    print(
        f"{name} keeps {sum(kept) / len(kept) / memory.seen[0]:.0%} (heads: {min(kept) / memory.seen[0]:.0%} to "
        f"{max(kept) / memory.seen[0]:.0%}); its parts, × dense's prefill: {shown}; dense's own attention "
        f"{attention_of_dense / whole:.2f}",
        flush=True,
    )


# ------------------------------------------------------------------------------------------------------------- figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memories", nargs="+", choices=[*NAMES, *NAMMS], default=[*NAMES, *NAMMS])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = smollm2(options.layers, options.prompt + (4 * options.rounds + 2) * STEPS)
    ids = torch.randint(1024, (1, options.prompt))
    print(f"{options.layers} layers, prompt {options.prompt}, budget {options.budget}, × DynamicCache")
    readers = {name: reader(model, name, options.budget, ids) for name in NAMES if name in options.memories}
    namms = namm_readers(model, [name for name in NAMMS if name in options.memories], ids)
    whole, short = dense(model, ids), dense(model, ids[:, : options.budget])
    times = in_turns({"dense": whole, "short": short, **readers, **namms}, options.rounds)
    for name in (*readers, *namms):
        show(f"prefill, {name}", times[name], times["dense"], 2.0 if name in namms else None)
    if "gemfilter" in readers:
        share = (GemFilter(model, options.budget).layer + 1) / options.layers
        ideal = [share * of_prompt + of_budget for of_prompt, of_budget in zip(times["dense"], times["short"])]
        show("prefill, gemfilter × ideal", times["gemfilter"], ideal)
    if namms:
        with timed(F, "scaled_dot_product_attention") as attention:
            whole()
        for name, read_namm in namms.items():
            show_parts(name, read_namm, median(times["dense"]), sum(attention))
    if readers:
        decode(model, readers, short, options.rounds)


def decode(model: PreTrainedModel, readers: dict, short: Callable[[], object], rounds: int) -> None:
    step = torch.zeros(1, 1, dtype=torch.long)

    def steps(cache: object) -> Callable[[], None]:
        def run() -> None:
            for _ in range(STEPS):
                read(model, step, cache)
            if cache.is_croppable:  # type: ignore[attr-defined]
                cache.crop(-STEPS)  # type: ignore[attr-defined]

        return run

    caches = {"dense": short(), **{name: run() for name, run in readers.items()}}
    times = in_turns({name: steps(cache) for name, cache in caches.items()}, 4 * rounds)
    for name in readers:
        show(f"decode, {name}", times[name], times["dense"], 1.1 if name == "gemfilter" else None)


if __name__ == "__main__":
    main()
