"""How each row of the table reads a prompt and scores the tokens after it.

A memory of `sinkmodel.memories` compresses the prompt. A StreamingCache (window, sink) keeps its sinks and its window
while it reads. Recompute keeps nothing and reads its window again for every token. All of them score the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.policies.recompute import Recompute
from sinkmodel.products import fast_products
from sinkmodel.scoring import nll_of

STEPS = 8  # tokens after the prompt that are fed one by one and timed
PIECE = 256  # the tokens after these are fed in pieces of this size


@dataclass(frozen=True)
class Reading:
    """The losses of the tokens after one prompt, and the time and memory that it took."""

    nll: Tensor  # [N] in nats, fp32 on the host
    prefill_seconds: float | None  # None if nothing is kept of the prompt
    decode_seconds: float | None  # per token; None if fewer than two tokens were fed one by one
    bytes_held: int | None  # all bytes of the cache at the end of the prompt; None if there is no cache
    bytes_kept: int | None  # the part of them that is keys and values of tokens
    keys_kept: float | None  # tokens that a KV head holds at that time, as a mean over layers and heads


Reader = Callable[
    [Any, list[int], list[int]], Reading
]  # arguments: model, prompt with the sinks in front, continuation


def memory_reader(make: Callable[[], Any]) -> Reader:
    """A reader that uses a new memory of `sinkmodel.memories` for each prompt."""

    def read(model: Any, prompt: list[int], continuation: list[int]) -> Reading:
        memory = make()
        memory.expect(len(prompt))
        return _read(model, memory, prompt, continuation)

    return read


def stream_reader(make: Callable[[], Any]) -> Reader:
    """A reader that uses a new StreamingCache for each prompt."""

    def read(model: Any, prompt: list[int], continuation: list[int]) -> Reading:
        return _read(model, make(), prompt, continuation)

    return read


def recompute_reader(policy: Recompute, front: int) -> Reader:
    """A reader that reads the last C tokens again for every scored token (see `eval.policies.recompute`)."""

    def read(model: Any, prompt: list[int], continuation: list[int]) -> Reading:
        assert policy.budget is not None
        text = [*prompt[:front], *prompt[max(front, len(prompt) - policy.budget - 1) :], *continuation]
        started = time.perf_counter()
        nll = policy.score(model, [text], PIECE, lambda count: None)[0][-len(continuation) :]
        seconds = (time.perf_counter() - started) / len(continuation)
        return Reading(nll, None, seconds, None, None, None)

    return read


@torch.inference_mode()
def _read(model: Any, cache: Any, prompt: list[int], continuation: list[int]) -> Reading:
    device = model.get_input_embeddings().weight.device
    prompt_1P, after_1N = (torch.tensor([ids], device=device) for ids in (prompt, continuation))
    started = time.perf_counter()
    with fast_products():
        logits = [model(input_ids=prompt_1P, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:]]
    _wait(device)
    prefill = time.perf_counter() - started
    sizes = cache.bytes_held, cache.bytes_kept, cache.keys_kept
    fed = after_1N[:, :-1]
    steps, rest = fed[:, :STEPS], fed[:, STEPS:]
    started = time.perf_counter()
    for step in steps.split(1, dim=1) if steps.numel() else ():
        logits.append(model(input_ids=step, past_key_values=cache, use_cache=True).logits)
    _wait(device)
    decode = (time.perf_counter() - started) / steps.shape[1] if steps.shape[1] > 1 else None
    for piece in rest.split(PIECE, dim=1) if rest.numel() else ():
        logits.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
    nll = nll_of(torch.cat(logits, dim=1), after_1N)[0].cpu()
    return Reading(nll, prefill, decode, *sizes)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
