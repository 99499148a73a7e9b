"""How much faster chunked scoring is than the paper's loop, which feeds a stream token by token, with equal numbers.

    python -m bench.scoring [--layers 2 --hidden 32 --vocabulary 64] [--budget 256 1024] [--sinks 4]

The baseline is the paper's evaluation of GPT-NeoX, rewritten from mit-han-lab/streaming-llm @2e50426
(`examples/eval_long_ppl.py`, `pos_shift/modify_gpt_neox.py`, `kv_cache.py`) and transformers 4.33, which it pins. It
feeds one token per step and caches unrotated keys. At every step it rotates every key of every layer by its place, and
computes attention as baddbmm, mask, softmax, matmul. After the forward it cuts every layer's keys and values and joins
them by `torch.cat`. Its progress bar and its log are left out. It keeps start + recent keys and lets each query see one
more, so our budget is start + recent + 1 (DESIGN.md, "The budget includes the current token").
"""

from __future__ import annotations

import argparse
import statistics
import time
import types

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from bench.ratios import of_rounds
from sinkmodel.attention import CAUSAL
from sinkmodel.scoring import streaming_nll


class PaperLoop:
    """The paper's loop with a GPT-NeoX of transformers. It replaces the attention's forward, as the paper does."""

    def __init__(self, model: GPTNeoXForCausalLM, start: int, recent: int):
        self.model, self.start, self.recent = model, start, recent
        self.past: list[tuple[Tensor, Tensor] | None] = [None] * len(model.gpt_neox.layers)
        P = model.config.max_position_embeddings
        cos_1PR, sin_1PR = model.gpt_neox.rotary_emb(torch.empty(0), torch.arange(P)[None])
        self.cos_11PR, self.sin_11PR = cos_1PR[None], sin_1PR[None]
        self.causal_11PP = torch.ones(P, P, dtype=torch.bool).tril()[None, None]

    def __enter__(self) -> PaperLoop:
        self.attention_before = self.model.config._attn_implementation
        self.model.set_attn_implementation(CAUSAL)  # never called; with this name transformers makes no mask
        for layer in self.model.gpt_neox.layers:
            layer.attention.forward = types.MethodType(self.attention, layer.attention)
        return self

    def __exit__(self, *exception: object) -> None:
        self.model.set_attn_implementation(self.attention_before)
        for layer in self.model.gpt_neox.layers:
            del layer.attention.forward

    @torch.no_grad()
    def nll(self, ids: list[int]) -> Tensor:
        tokens_1T, loss = torch.tensor([ids]), torch.nn.CrossEntropyLoss(reduction="none")
        nll = []
        for t in range(len(ids) - 1):
            logits_11V = self.model(input_ids=tokens_1T[:, t : t + 1], use_cache=False).logits
            nll.append(loss(logits_11V.view(-1, logits_11V.shape[-1]), tokens_1T[:, t + 1 : t + 2].view(-1)))
            self.evict()
        return torch.cat(nll)

    def evict(self) -> None:
        n = self.past[0][0].shape[2]
        if n > self.start + self.recent:
            kept = slice(0, self.start), slice(n - self.recent, n)
            self.past = [tuple(torch.cat([x[:, :, part] for part in kept], dim=2) for x in past) for past in self.past]

    def attention(self, module, hidden_11E: Tensor, **_) -> tuple[Tensor, None]:
        """Attention of one new token to K keys, its own included."""
        H, D = module.config.num_attention_heads, module.head_size
        q, k, v = module.query_key_value(hidden_11E).view(1, 1, H, 3 * D).permute(0, 2, 1, 3).chunk(3, dim=-1)
        past = self.past[module.layer_idx]
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        self.past[module.layer_idx] = k, v
        K = k.shape[2]
        places_1K = torch.arange(K)[None]
        q, k = self.rotated(q, places_1K[:, -1:]), self.rotated(k, places_1K)
        score = torch.baddbmm(torch.zeros(H, 1, K), q.view(H, 1, D), k.view(H, K, D).mT, alpha=module.scaling)
        lowest = torch.tensor(torch.finfo(score.dtype).min)
        score = torch.where(self.causal_11PP[:, :, K - 1 : K, :K], score.view(1, H, 1, K), lowest)
        out_1H1D = torch.matmul(F.softmax(score, dim=-1), v)
        return module.dense(out_1H1D.permute(0, 2, 1, 3).contiguous().view(1, 1, H * D)), None

    def rotated(self, x_1HKD: Tensor, places_1K: Tensor) -> Tensor:
        """RoPE at these places. Cosines and sines are gathered from a copy of the whole table, as in the paper."""
        R = self.cos_11PR.shape[-1]
        index_11KR = places_1K[:, None, :, None].repeat(1, 1, 1, R)
        cos, sin = (torch.gather(table.repeat(1, 1, 1, 1), 2, index_11KR) for table in (self.cos_11PR, self.sin_11PR))
        x, rest = x_1HKD[..., :R], x_1HKD[..., R:]
        half_turned = torch.cat([-x[..., R // 2 :], x[..., : R // 2]], dim=-1)
        return torch.cat([x * cos + half_turned * sin, rest], dim=-1)


def random_model(layers: int, hidden: int, heads: int, vocabulary: int, positions: int) -> GPTNeoXForCausalLM:
    """A model with random weights, large enough that attention is far from uniform."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=positions,
        rotary_pct=0.25,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config).eval()


def compare(model: GPTNeoXForCausalLM, budget: int, options: argparse.Namespace) -> str:
    """Run both sides alternately over streams of budget + `--tokens` tokens; every round gives a ratio."""
    sinks, length = options.sinks, budget + options.tokens
    documents = torch.randint(0, model.config.vocab_size, (options.documents, length)).tolist()
    streaming_nll(model, documents, budget, sinks)  # warm-up
    chunked_speed, loop_speed = [], []
    for _ in range(options.rounds):
        started = time.perf_counter()
        chunked = streaming_nll(model, documents, budget, sinks)
        chunked_speed.append(options.documents * (length - 1) / (time.perf_counter() - started))
        with PaperLoop(model, sinks, budget - 1 - sinks) as loop:
            started = time.perf_counter()
            nll = loop.nll(documents[0])
            loop_speed.append((length - 1) / (time.perf_counter() - started))
    difference = (chunked[0] - nll).abs().max().item()
    assert difference < 1e-4, f"the two sides disagree by {difference} nats"
    config, threads = model.config, torch.get_num_threads()
    return (
        f"scoring: {of_rounds(chunked_speed, loop_speed, digits=0)} × the paper's token-by-token loop "
        f"({statistics.median(chunked_speed):,.0f} against {statistics.median(loop_speed):,.0f} "
        f"tokens/s; {sinks}+{budget - sinks}, GPT-NeoX {config.num_hidden_layers} layers d {config.hidden_size} "
        f"{config.num_attention_heads} heads vocabulary {config.vocab_size}, {threads} threads, largest difference "
        f"{difference:.0e} nats)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=64)
    parser.add_argument("--budget", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a document beyond the budget")
    parser.add_argument("--documents", type=int, default=8, help="documents that chunked scoring scores")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    positions = 2 * max(options.budget)
    model = random_model(options.layers, options.hidden, options.heads, options.vocabulary, positions)
    for budget in options.budget:
        print(compare(model, budget, options), flush=True)


if __name__ == "__main__":
    main()
