"""How much quicker chunked scoring is than feeding a stream token by token, with equal numbers.

    python -m bench.scoring [--tokens 2048] [--budget 256] [--sinks 4]

The baseline is the paper's loop (StreamingLLM, `enable_streaming_llm.py` and `examples/eval_long_ppl.py`): one token
a step, raw keys in the cache, all of them rotated by place in the cache at every step, old ones cut out and the rest
joined with `torch.cat`. Here it evicts before it attends, so that both see C keys (design, decision 8).
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM

from sinkmodel.rope import apply, rotary_of
from sinkmodel.scoring import streaming_nll


class PaperCache(DynamicCache):
    """`start_size` + `recent_size` raw keys a layer, joined anew at every step."""

    def __init__(self, budget: int, sinks: int):
        super().__init__()
        self.budget, self.sinks = budget, sinks

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        super().update(key_states, value_states, layer_idx)
        layer = self.layers[layer_idx]
        if layer.keys.shape[2] > self.budget:
            recent = self.budget - self.sinks
            layer.keys = torch.cat([layer.keys[:, :, : self.sinks], layer.keys[:, :, -recent:]], dim=2)
            layer.values = torch.cat([layer.values[:, :, : self.sinks], layer.values[:, :, -recent:]], dim=2)
        return layer.keys, layer.values


@torch.inference_mode()
def token_by_token(model, ids: list[int], budget: int, sinks: int) -> torch.Tensor:
    rotary = rotary_of(model)
    cos, sin = rotary.rotation(torch.arange(budget))  # computed once, which is kind to the baseline

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        n = key.shape[2]
        query, key = apply(query, (cos[n - 1 : n], sin[n - 1 : n])), apply(key, (cos[:n], sin[:n]))
        return F.scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None

    AttentionInterface.register("bench_paper_loop", attend)
    before = model.config._attn_implementation
    model.set_attn_implementation("bench_paper_loop")
    cache, raw = PaperCache(budget, sinks), torch.zeros(1, 1, dtype=torch.long)  # at position 0 RoPE leaves keys raw
    tokens = torch.tensor(ids)
    nll = torch.empty(len(ids) - 1)
    for t in range(len(ids) - 1):
        logits = model(input_ids=tokens[t].view(1, 1), position_ids=raw, past_key_values=cache, use_cache=True).logits
        nll[t] = F.cross_entropy(logits[0], tokens[t + 1 : t + 2])
    model.set_attn_implementation(before)
    return nll


def tiny_model(vocabulary: int = 2048) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        rotary_pct=0.25,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--documents", type=int, default=4, help="how many the chunked form scores at once")
    parser.add_argument("--rounds", type=int, default=3, help="the two sides alternate; the best of each counts")
    options = parser.parse_args()
    model = tiny_model()
    documents = torch.randint(0, 2048, (options.documents, options.tokens)).tolist()
    chunked_best = loop_best = 0.0
    streaming_nll(model, documents, options.budget, options.sinks)  # warm-up
    for _ in range(options.rounds):
        started = time.perf_counter()
        chunked = streaming_nll(model, documents, options.budget, options.sinks)
        chunked_best = max(chunked_best, options.documents * (options.tokens - 1) / (time.perf_counter() - started))
        started = time.perf_counter()
        loop = token_by_token(model, documents[0], options.budget, options.sinks)
        loop_best = max(loop_best, (options.tokens - 1) / (time.perf_counter() - started))
    difference = (chunked[0] - loop).abs().max().item()
    assert difference < 1e-4, f"the two sides disagree by {difference} nats"
    print(
        f"scoring: {chunked_best / loop_best:.0f}× the paper's token-by-token loop "
        f"({chunked_best:,.0f} against {loop_best:,.0f} tokens/s, {options.sinks}+{options.budget - options.sinks}, "
        f"GPT-NeoX 4 layers d 128, {torch.get_num_threads()} threads, largest difference {difference:.0e} nats)"
    )


if __name__ == "__main__":
    main()
