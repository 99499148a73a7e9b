"""Streaming the slow, obvious way: one token at a time, raw keys, every rotation recomputed at every step.

It borrows a model's weights (its linear layers and norms) and nothing else: cache, positions, rotation and attention
are written out here, after StreamingLLM section 3.2. Budget C counts the sinks and the current token.
"""

from __future__ import annotations

import torch


@torch.no_grad()
def streaming_logits(
    model, ids: list[int], budget: int, sinks: int, positions: str = "cache", start: int = 0
) -> torch.Tensor:
    """Logits [T − 1, V] of every token of `ids` but the last, each seeing the keys that the cache then holds.

    positions: "cache" (the place in the cache) or "text" (the index in the text, in which `ids` begin at `start`).
    """
    fused = model.config.model_type.endswith("gpt_neox")
    inner = model.base_model
    raw_keys = [[] for _ in inner.layers]
    values = [[] for _ in inner.layers]
    logits = []
    for t, token in enumerate(ids[:-1]):
        kept = list(range(t + 1)) if t < budget else [*range(sinks), *range(t + 1 - (budget - sinks), t + 1)]
        places = torch.arange(len(kept)) if positions == "cache" else start + torch.tensor(kept)
        x = model.get_input_embeddings()(torch.tensor([[token]]))
        for i, layer in enumerate(inner.layers):
            q, k, v = (neox_qkv if fused else llama_qkv)(model, layer, x)  # [heads, D]
            raw_keys[i].append(k)
            values[i].append(v)
            keys = rotated(model, torch.stack([raw_keys[i][j] for j in kept]), places)  # [n, groups, D]
            query = rotated(model, q[None], places[-1:])[0]
            shared = query.shape[0] // keys.shape[1]
            keys = keys.repeat_interleave(shared, dim=1)
            held = torch.stack([values[i][j] for j in kept]).repeat_interleave(shared, dim=1)
            scores = torch.einsum("hd,nhd->hn", query, keys) / keys.shape[-1] ** 0.5
            weights = torch.softmax(torch.cat([scores, *sink_column(model, layer, query)], dim=1), dim=-1)
            out = torch.einsum("hn,nhd->hd", weights[:, : len(kept)], held).reshape(1, 1, -1)
            if fused:
                out = layer.attention.dense(out)
                if layer.use_parallel_residual:
                    x = x + out + layer.mlp(layer.post_attention_layernorm(x))
                else:
                    x = x + out
                    x = x + layer.mlp(layer.post_attention_layernorm(x))
            else:
                x = x + layer.self_attn.o_proj(out)
                x = x + layer.mlp(layer.post_attention_layernorm(x))
        x = inner.final_layer_norm(x) if fused else inner.norm(x)
        logits.append(model.get_output_embeddings()(x)[0, 0])
    return torch.stack(logits)


def sink_column(model, layer, query: torch.Tensor) -> list[torch.Tensor]:
    """The score [heads, 1] of a sink in the softmax, as one more key: of zeros, of none, or learned and at place 0."""
    kind = (getattr(model.config, "sink", None) or {}).get("kind")
    attention = layer.attention if hasattr(layer, "attention") else layer.self_attn
    if kind == "zero":
        return [torch.zeros(len(query), 1)]
    if kind == "logit":
        return [attention.sink[:, None]]
    if kind == "kv_bias":
        keys = attention.sink.repeat_interleave(len(query) // len(attention.sink), dim=0)
        return [(query * keys).sum(-1, keepdim=True) / keys.shape[-1] ** 0.5]
    return []


def streaming_nll(model, ids: list[int], budget: int, sinks: int) -> torch.Tensor:
    log_p = torch.log_softmax(streaming_logits(model, ids, budget, sinks), dim=-1)
    return -log_p[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def neox_qkv(model, layer, x):
    heads = model.config.num_attention_heads
    fused = layer.attention.query_key_value(layer.input_layernorm(x)).reshape(heads, -1)
    return fused.chunk(3, dim=-1)


def llama_qkv(model, layer, x):
    attention, x = layer.self_attn, layer.input_layernorm(x)
    size = attention.head_dim
    q, k, v = (p(x).reshape(-1, size) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return q, k, v


def rotated(model, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """RoPE of x [n, heads, D] at `places` [n], pair by pair, in fp64."""
    rotary = model.base_model.rotary_emb
    frequencies, factor = rotary.inv_freq.double(), rotary.attention_scaling
    half = len(frequencies)
    out = x.double().clone()
    for i, frequency in enumerate(frequencies):
        angle = (places * frequency)[:, None]
        a, b = x[..., i].double(), x[..., i + half].double()
        out[..., i] = factor * (a * angle.cos() - b * angle.sin())
        out[..., i + half] = factor * (b * angle.cos() + a * angle.sin())
    return out.to(x.dtype)
