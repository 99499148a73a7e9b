"""What products through oneDNN give on this CPU: training steps and chunked scoring, as ratios to PyTorch's own.

    python -m bench.products [--rounds 5] [--model NAME]

Both sides take turns in one process of one thread, and its CPU time counts, so that what else the machine does matters
little. Training is the recipe `tiny`: forward, chunked loss, backward, clipping and AdamW. Scoring is `streaming_nll`
at C = 256 with one sink, of a random model in SmolLM2-135M's shape with fewer layers, or of `--model`. The first line
is what SINKMODEL_PRODUCTS=auto chooses here. If PyTorch is fast here, MKL_ENABLE_INSTRUCTIONS=AVX2 in the environment
makes MKL compute as it does on processors of other makers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.ratios import of_rounds
from recipes.config import load_config
from recipes.training.loss import LossHead
from recipes.training.optimizer import build_optimizer
from recipes.training.settings import PretrainConfig
from sinkmodel.attention import CAUSAL
from sinkmodel.loading import load_model
from sinkmodel.models import build_model, head_of
from sinkmodel.products import ONEDNN, TORCH, fast_products, library
from sinkmodel.scoring import streaming_nll

VOCABULARY = 2176


def training() -> Callable[[], Any]:
    """One step of the recipe `tiny`."""
    config = load_config(PretrainConfig, ["--config", "tiny", "--data.path=-", "--output=-"], "", "sink-pretrain")
    model = build_model(config.model, VOCABULARY, config.seed)
    model.set_attn_implementation(CAUSAL)
    model.set_output_embeddings(LossHead(head_of(model), config.training.head_chunk))
    optimizer = build_optimizer(model, config.optimizer)
    rows = config.training.batch_tokens // config.data.sequence
    ids_BT = torch.randint(0, VOCABULARY, (rows, config.data.sequence))

    def step() -> None:
        for part_BT in ids_BT.split(config.training.micro_rows):
            hidden = model.base_model(input_ids=part_BT, use_cache=False).last_hidden_state
            loss, _ = head_of(model)(hidden.flatten(0, 1), part_BT.flatten())
            (loss * len(part_BT) / rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def scoring(name: str | None) -> Callable[[], Any]:
    """Four documents of 512 tokens."""
    model = load_model(name).model if name else smollm2(layers=4)
    ids_BT = torch.randint(1, min(40_000, model.config.vocab_size), (4, 512))
    return lambda: streaming_nll(model.eval(), ids_BT.tolist(), 256, 1)


def smollm2(layers: int) -> LlamaForCausalLM:
    """Random weights in the shape of SmolLM2-135M, which has 30 layers."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=49_152, num_hidden_layers=layers, tie_word_embeddings=True, **sizes))


def compare(what: str, work: Callable[[], Any], rounds: int) -> str:
    times: dict[str, list[float]] = {TORCH: [], ONEDNN: []}
    for _ in range(rounds + 1):  # the first one warms up
        for chosen, found in times.items():
            with fast_products(chosen):
                started = time.process_time()
                work()
                found.append(time.process_time() - started)
    ours, theirs = (1000 * statistics.median(times[side][1:]) for side in (ONEDNN, TORCH))
    return (
        f"products: {what} through oneDNN is {of_rounds(times[TORCH][1:], times[ONEDNN][1:])} × as fast as through "
        f"PyTorch's own; {ours:,.0f} ms of CPU time, {theirs:,.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="the model that is scored (default: random weights in SmolLM2's shape)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"products: this machine trains with {library()} and scores with {library(backward=False)}")
    print(compare("a training step", training(), options.rounds), flush=True)
    print(compare("scoring", scoring(options.model), options.rounds), flush=True)


if __name__ == "__main__":
    main()
