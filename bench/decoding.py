"""The cost of a decoding step with a full `StreamingCache`, compared with common caches.

    python -m bench.decoding [--layers 12 --hidden 768] [--budgets 256 … 4096] [--compiled 256 1024]

Each line is a ratio of medians, ours to theirs, with a 95 % bootstrap interval. The sides alternate step by step.

    StaticCache, DynamicCache   transformers' own, holding as many keys; compared with the faster of the two
    rotate-everything           the paper's way (mit-han-lab/streaming-llm): unrotated keys, all rotated by place at
                                every step, joined by `torch.cat`, and cut and joined again after the forward. Faster
                                than the paper's code: cosines and sines are computed once, and the attention is
                                PyTorch's fused one
    recompute                   no cache: the whole window goes through the model at every step, for its last logits

Random weights in Pythia-160M's shape, fp32. Caches are filled with random keys, since their content does not matter.
"Compiled" is `torch.compile` of the unmodified model, which needs a C++ compiler and half a minute per budget.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel, StaticCache

from bench.ratios import interval
from eval.measures.timing import now
from sinkmodel.cache import StreamingCache
from sinkmodel.models import build_model
from sinkmodel.shapes import ModelShape

VOCABULARY = 50304
PAPER = "rotate-everything"
AT_ZERO = torch.zeros(1, 1, dtype=torch.long)  # the position at which RoPE does not change keys


def rotating_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    cos_KR, sin_KR = module.places
    K = key.shape[2]
    query, key = rotated(query, cos_KR[K - 1 : K], sin_KR[K - 1 : K]), rotated(key, cos_KR[:K], sin_KR[:K])
    return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None


def evict(cache: DynamicCache, start: int, recent: int) -> None:
    """Evict after the forward, so a query sees one key more (DESIGN.md, "The budget includes the current token")."""
    for layer in cache.layers:
        if layer.keys.shape[2] > start + recent:
            layer.keys = torch.cat([layer.keys[:, :, :start], layer.keys[:, :, -recent:]], dim=2)
            layer.values = torch.cat([layer.values[:, :, :start], layer.values[:, :, -recent:]], dim=2)


def rotated(x_BHKD: Tensor, cos_KR: Tensor, sin_KR: Tensor) -> Tensor:
    R = cos_KR.shape[-1]
    x, rest = x_BHKD[..., :R], x_BHKD[..., R:]
    half_turned = torch.cat([-x[..., R // 2 :], x[..., : R // 2]], dim=-1)
    return torch.cat([x * cos_KR + half_turned * sin_KR, rest], dim=-1)


AttentionInterface.register("bench_rotating", rotating_attention)


def rotating_twin(model: PreTrainedModel, budget: int) -> PreTrainedModel:
    """A model that shares the weights and whose attention rotates everything."""
    twin = type(model)(type(model.config)(**model.config.to_dict())).eval()
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.set_attn_implementation("bench_rotating")
    cos, sin = model.gpt_neox.rotary_emb(torch.empty(0), torch.arange(budget)[None])
    for layer in twin.gpt_neox.layers:
        layer.attention.places = cos[0], sin[0]
    return twin


# ---------------------------------------------------------------------------------------------------------- the sides

Side = tuple[Callable[[Tensor], object], Callable[[], object]]  # a step, and a reset of the cache (untimed)


def streaming(model: PreTrainedModel, run: Callable, budget: int, sinks: int) -> tuple[Side, StreamingCache]:
    cache = StreamingCache(model.config, budget, sinks)
    model(input_ids=AT_ZERO.to(model.device), past_key_values=cache)
    state = cache.state_dict()
    for name in ("keys", "values", "sink_keys"):
        state[name].normal_()
    fed = 10 * budget
    cache.load_state_dict({**state, "seen": [fed], "columns": fed, "origin": [fed - budget]})
    return (lambda ids: run(input_ids=ids, past_key_values=cache), lambda: None), cache


def static(model: PreTrainedModel, run: Callable, budget: int) -> Side:
    cache = StaticCache(config=model.config, max_cache_len=budget)
    fill(cache, model, budget - 1)

    def back() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(budget - 1)

    return lambda ids: run(input_ids=ids, past_key_values=cache), back


def dynamic(model: PreTrainedModel, run: Callable, budget: int) -> Side:
    cache = DynamicCache()
    fill(cache, model, budget - 1)
    return lambda ids: run(input_ids=ids, past_key_values=cache), lambda: cache.crop(-1)


def rotating(twin: PreTrainedModel, run: Callable, budget: int, sinks: int) -> Side:
    cache = DynamicCache()
    fill(cache, twin, budget - 1)

    def step(ids: Tensor) -> None:
        run(input_ids=ids, past_key_values=cache, position_ids=AT_ZERO)
        evict(cache, sinks, budget - 1 - sinks)

    return step, lambda: None


def fill(cache, model: PreTrainedModel, count: int) -> None:
    config, like = model.config, {"device": model.device, "dtype": model.dtype}
    groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
    shape = 1, groups, count, config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape, **like), torch.randn(shape, **like), layer)


def alternate(sides: dict[str, Side], rounds: int, warm_up: int = 3, device: str = "cpu") -> dict[str, list[float]]:
    """Times of each step of each side, in milliseconds."""
    where = torch.device(device)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(warm_up + rounds):
        ids = torch.randint(0, 256, (1, 1)).to(where)
        for name, (step, back) in sides.items():
            started = now(where)
            step(ids)
            if i >= warm_up:
                taken[name].append(1e3 * (now(where) - started))
            back()
    return taken


# -------------------------------------------------------------------------------------------------------- the figures


def compare(model: PreTrainedModel, budget: int, mode: str, options: argparse.Namespace) -> None:
    """Compare a step with a full cache: ours with transformers' caches, and with rotating everything."""
    torch._dynamo.reset()
    twin = rotating_twin(model, budget)
    run, run_twin = (torch.compile(model), torch.compile(twin)) if mode == "compiled" else (model, twin)
    ours, cache = streaming(model, run, budget, options.sinks)
    sides = {"StreamingCache": ours, "StaticCache": static(model, run, budget)}
    if mode == "eager":  # a compiled model would be compiled again at every length
        sides["DynamicCache"] = dynamic(model, run, budget)
    sides[PAPER] = rotating(twin, run_twin, budget, options.sinks)
    taken = alternate(sides, options.rounds)
    # One step in 2C turns the window to renumber positions. It is not among the timed steps, so each gets its share.
    share = moving(cache) / (2 * budget)
    taken["StreamingCache"] = [x + share for x in taken["StreamingCache"]]
    ms = {name: statistics.median(x) for name, x in taken.items()}
    usual = min(("StaticCache", "DynamicCache"), key=lambda name: ms.get(name, float("inf")))
    ratios = [f"{ratio(taken, 'StreamingCache', other)} {other} ({ms[other]:.1f} ms)" for other in (usual, PAPER)]
    side = f"decoding, {mode}, {options.sinks}+{budget - options.sinks}: StreamingCache ({ms['StreamingCache']:.1f} ms)"
    print(f"{side} takes {', '.join(ratios)}", flush=True)


def moving(cache: StreamingCache) -> float:
    """Milliseconds of renumbering positions, which turns every key of the window."""
    times, device = [], cache.layers[0].keys.device
    for _ in range(3):
        started = now(device)
        cache.state._move_origin([origin + 1 for origin in cache.state.origin])
        times.append(1e3 * (now(device) - started))
    return statistics.median(times)


def recompute(model: PreTrainedModel, budget: int, options: argparse.Namespace) -> None:
    ours, _ = streaming(model, model, budget, options.sinks)
    window = torch.randint(0, 1000, (1, budget))
    again: Side = (lambda ids: model(input_ids=window, use_cache=False, logits_to_keep=1), lambda: None)
    taken = alternate({"recompute": again, "StreamingCache": ours}, options.recompute_rounds, warm_up=0)
    ms = {name: statistics.median(x) for name, x in taken.items()}
    print(
        f"decoding, eager, {options.sinks}+{budget - options.sinks}: recompute takes "
        f"{ratio(taken, 'recompute', 'StreamingCache')} StreamingCache "
        f"({ms['recompute']:,.0f} against {ms['StreamingCache']:.1f} ms)",
        flush=True,
    )


def ratio(taken: dict[str, list[float]], one: str, other: str, draws: int = 1000) -> str:
    """`1.02× (95 %: 1.00 to 1.05)`: the ratio of medians, and a 95 % interval from rounds drawn with replacement."""
    rng, rounds = random.Random(0), list(zip(taken[one], taken[other]))

    def of(pairs: list[tuple[float, float]]) -> float:
        return statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)

    drawn = sorted(of(rng.choices(rounds, k=len(rounds))) for _ in range(draws))
    return f"{of(rounds):.2f}× {interval(drawn[int(0.025 * draws)], drawn[int(0.975 * draws)])}"


def check() -> None:
    """Check that the rotate-everything side computes the same as a StreamingCache, so that the comparison is fair."""
    model = build_model(ModelShape(layers=2, hidden=64, heads=4, kv_heads=4, ffn=64, positions=64), 128, seed=1).eval()
    twin, ours, theirs = rotating_twin(model, 16), StreamingCache(model.config, 16, 4), DynamicCache()
    for ids in torch.randint(0, 128, (48, 1, 1)):
        logits = model(input_ids=ids, past_key_values=ours).logits
        other = twin(input_ids=ids, past_key_values=theirs, position_ids=AT_ZERO).logits
        evict(theirs, 4, 11)
        torch.testing.assert_close(logits, other, atol=1e-4, rtol=0)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--budgets", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--compiled", type=int, nargs="*", default=[256, 1024], help="budgets with a compiled model")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--recompute-rounds", type=int, default=2, help="0 omits the recompute line")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    check()
    heads = options.hidden // 64
    shape = ModelShape(
        layers=options.layers,
        hidden=options.hidden,
        heads=heads,
        kv_heads=heads,
        ffn=4 * options.hidden,
        positions=8192,
    )
    model = build_model(shape, VOCABULARY, seed=0).eval()
    for mode, budgets in (("eager", options.budgets), ("compiled", options.compiled)):
        for budget in budgets:
            compare(model, budget, mode, options)
    if options.recompute_rounds:
        recompute(model, max(options.budgets, default=4096), options)


if __name__ == "__main__":
    main()
