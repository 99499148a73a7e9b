"""The cost of KV memories compared with dense attention: reading a prompt, and a decoding step after it.

    python -m bench.memories [--layers 8] [--prompt 4096] [--budget 1024] [--rounds 5]

Each line is a ratio of times to those of transformers' DynamicCache in the same run: the median over rounds in which
the sides alternate, with the smallest and the largest. Random weights in SmolLM2-135M's shape with fewer layers, fp32.

    prefill    reading the prompt and compressing it, with the logits of its last token; CPU time of the process
    decode     a step with the budget's keys, compared with a step of a DynamicCache that holds as many
    ideal      for GemFilter: (r + 1)/L of dense's prefill plus a prefill of the budget
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sinkmodel.memories import GemFilter, make_memory

NAMES = ("snapkv", "tova", "expected-attention", "h2o", "gemfilter")
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


def show(label: str, ours: list[float], theirs: list[float]) -> None:
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    print(f"{label:32} {statistics.median(ratios):5.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = smollm2(options.layers, options.prompt + (4 * options.rounds + 2) * STEPS)
    ids = torch.randint(1024, (1, options.prompt))
    print(f"{options.layers} layers, prompt {options.prompt}, budget {options.budget}, × DynamicCache")
    readers = {name: reader(model, name, options.budget, ids) for name in NAMES}
    short = dense(model, ids[:, : options.budget])
    times = in_turns({"dense": dense(model, ids), "short": short, **readers}, options.rounds)
    for name in NAMES:
        show(f"prefill, {name}", times[name], times["dense"])
    share = (GemFilter(model, options.budget).layer + 1) / options.layers
    ideal = [share * whole + part for whole, part in zip(times["dense"], times["short"])]
    show("prefill, gemfilter × ideal", times["gemfilter"], ideal)
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
    for name in NAMES:
        show(f"decode, {name}", times[name], times["dense"])


if __name__ == "__main__":
    main()
