"""A step of a full `StreamingCache` beside the other ways to stream with sinks, and beside what no cache can avoid.

    python -m bench.peers.decoding [--layers 12 --hidden 768] [--budgets 256 1024] [--rounds 9]

Each side decodes a block of tokens in turn, eager, on one pinned thread, with random weights in Pythia-160M's shape.

    the paper's way   unrotated keys, all of them rotated by place at every step, scores and softmax written out, cut
                      and joined by `torch.cat` after the forward: `bench.scoring.PaperLoop`, rewritten from the paper's
                      code. attention_sinks replaces the attention and cuts the cache in the same way
    SinkCache's way   transformers 4.36 to 4.52: keys are cached as rotated; at every step the whole window is turned
                      back by one place, and cut and joined by `torch.cat`. Written from its description, on the
                      model's own attention
    its products      only the matrix products of the step, and attention over the budget: the physical limit
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GPTNeoXForCausalLM, PreTrainedModel

from bench.decoding import fill, rotated, streaming
from bench.peers.gate import pin
from bench.peers.turns import Block, Spent, compared, cpu_seconds, take_turns, timed
from bench.scoring import PaperLoop, random_model

OURS, PAPER, SINK_CACHE, PRODUCTS = "StreamingCache", "the paper's way", "SinkCache's way", "its products"
VOCABULARY = 50_304


class SinkCacheWay:
    """A `DynamicCache` whose window is turned back by one place before each step, once it is full."""

    def __init__(self, model: GPTNeoXForCausalLM, budget: int, sinks: int):
        self.model, self.budget, self.sinks, self.cache = model, budget, sinks, DynamicCache()
        cos_1PR, sin_1PR = model.gpt_neox.rotary_emb(torch.empty(0), torch.tensor([[-1]]))
        self.back = cos_1PR[0], sin_1PR[0]

    def step(self, ids_11: Tensor) -> Tensor:
        held = self.cache.get_seq_length()
        if held == self.budget:
            for layer in self.cache.layers:
                kept = rotated(layer.keys[:, :, self.sinks + 1 :], *self.back)
                layer.keys = torch.cat([layer.keys[:, :, : self.sinks], kept], dim=2)
                rest = layer.values[:, :, self.sinks + 1 :]
                layer.values = torch.cat([layer.values[:, :, : self.sinks], rest], dim=2)
            held -= 1
        return self.model(input_ids=ids_11, past_key_values=self.cache, position_ids=torch.tensor([[held]])).logits


class PaperWay:
    """`PaperLoop` one step at a time."""

    def __init__(self, model: GPTNeoXForCausalLM, budget: int, sinks: int):
        self.loop = PaperLoop(model, sinks, budget - 1 - sinks)

    def step(self, ids_11: Tensor) -> Tensor:
        with self.loop:  # the model is shared: another side needs its attention as it was
            logits = self.loop.model(input_ids=ids_11, use_cache=False).logits
        self.loop.evict()
        return logits


def products_of(model: PreTrainedModel, budget: int) -> Callable[[Tensor], object]:
    """The products of one token: every linear layer, and attention of every layer over `budget` keys."""
    config = model.config
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = [torch.randn(1, layer.in_features) for layer in layers]
    shape = 1, config.num_attention_heads, budget, config.hidden_size // config.num_attention_heads
    heads = [[torch.randn(shape) for _ in range(2)] for _ in range(config.num_hidden_layers)]

    def step(ids_11: Tensor) -> None:
        for layer, x in zip(layers, inputs):
            F.linear(x, layer.weight, layer.bias)
        for keys, values in heads:
            F.scaled_dot_product_attention(keys[:, :, :1], keys, values)

    return step


def full_sides(model: GPTNeoXForCausalLM, budget: int, sinks: int) -> dict[str, Callable[[Tensor], object]]:
    """A step of each side, with a full cache of random keys, since their content does not matter."""
    (ours, _), _ = streaming(model, model, budget, sinks)
    paper, turned = PaperWay(model, budget, sinks), SinkCacheWay(model, budget, sinks)
    full = DynamicCache()
    fill(full, model, budget - 1)
    paper.loop.past = [(layer.keys.clone(), layer.values.clone()) for layer in full.layers]
    fill(turned.cache, model, budget)
    return {OURS: ours, PAPER: paper.step, SINK_CACHE: turned.step, PRODUCTS: products_of(model, budget)}


def block_of(step: Callable[[Tensor], object], tokens: Tensor) -> Block:
    """A block that feeds all `tokens`, [N], after one token that is not timed."""

    def block() -> Spent:
        step(tokens[:1, None])
        return timed(lambda: [step(one[None, None]) for one in tokens])

    return block


def report(spent: dict[str, Sequence[Spent]], tokens: int, budget: int, sinks: int) -> list[str]:
    ms = {name: 1e3 * cpu_seconds(blocks) / tokens for name, blocks in spent.items()}
    head = f"decoding, eager, {sinks}+{budget - sinks}: {OURS} ({ms[OURS]:.1f} ms of CPU time a token)"
    lines = [
        f"{head} is {compared(spent[OURS], spent[name])} as {name} ({ms[name]:.1f} ms)" for name in (PAPER, SINK_CACHE)
    ]
    shares = ", ".join(f"{name} {ms[PRODUCTS] / ms[name]:.0%}" for name in (OURS, PAPER, SINK_CACHE))
    limit = f"{ms[PRODUCTS]:.1f} ms for the products of a token"
    return [*lines, f"decoding, eager, {sinks}+{budget - sinks}: share of the limit ({limit}): {shares}"]


@torch.no_grad()
def largest_difference(budget: int = 16, sinks: int = 4, length: int = 48) -> float:
    """Feed the same tokens to all three caches, past their budget; the largest difference between their logits."""
    from sinkmodel.cache import StreamingCache

    model = random_model(2, 32, 4, 64, 4 * budget)
    cache = StreamingCache(model.config, budget, sinks)
    paper, turned = PaperWay(model, budget, sinks), SinkCacheWay(model, budget, sinks)
    found = 0.0
    for ids_11 in torch.randint(0, 64, (length, 1, 1)):
        ours = model(input_ids=ids_11, past_key_values=cache).logits
        found = max([found, *((ours - side.step(ids_11)).abs().max().item() for side in (paper, turned))])
    return found


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768, help="a multiple of 64, the size of a head")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8, help="tokens of a block")
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each side; five or more have an interval")
    options = parser.parse_args(argv)
    pin()
    torch.set_num_threads(1)
    difference = largest_difference()
    assert difference < 1e-3, f"the sides disagree by {difference}"
    positions = 2 * max(options.budgets)
    model = random_model(options.layers, options.hidden, options.hidden // 64, options.vocabulary, positions)
    for budget in options.budgets:
        steps = full_sides(model, budget, options.sinks)
        tokens = torch.randint(0, options.vocabulary, (options.tokens,))
        spent = take_turns({name: block_of(step, tokens) for name, step in steps.items()}, options.rounds)
        print(*report(spent, options.tokens, budget, options.sinks), sep="\n", flush=True)


if __name__ == "__main__":
    main()
