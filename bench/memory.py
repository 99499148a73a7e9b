"""How much the process grows during a stream of a million tokens.

    python -m bench.memory [--tokens 1000000] [--budget 1024] [--sinks 1]

A tiny model (1 layer, d 32, random weights) streams with one `StreamingCache`: in pieces for speed, and the last 50,000
tokens one by one. Resident memory (Linux, /proc/self/statm) is read after a warm-up and at the end, both times after a
garbage collection and `malloc_trim`, because the freed memory that the C library keeps varies by 7 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import time
from pathlib import Path

import torch

from sinkmodel.cache import StreamingCache
from sinkmodel.models import build_model
from sinkmodel.shapes import ModelShape

VOCABULARY, PIECE = 128, 4096
WARM_UP = 16 * PIECE, 2_000  # tokens in pieces, and one by one


def resident_mb() -> float:
    gc.collect()
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--one-by-one", type=int, default=50_000, help="tokens at the end, fed one by one")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--sinks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = build_model(ModelShape(layers=1, hidden=32, heads=2, kv_heads=2, ffn=64), VOCABULARY, seed=0).eval()
    cache = StreamingCache(model.config, options.budget, options.sinks)

    def feed(count: int, piece: int) -> None:
        while count:
            ids = torch.randint(0, VOCABULARY, (1, min(piece, count)))
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
            count -= ids.shape[1]

    feed(WARM_UP[0], PIECE)
    feed(WARM_UP[1], 1)
    before, started = resident_mb(), time.perf_counter()
    feed(options.tokens - options.one_by_one, PIECE)
    between = resident_mb()
    feed(options.one_by_one, 1)
    after, seconds = resident_mb(), time.perf_counter() - started
    layer = cache.layers[0]
    assert layer.keys.shape[2] == layer.values.shape[2] == options.budget, "exactly S+W slots"
    assert cache.seen == [sum(WARM_UP) + options.tokens]
    pieces = options.tokens - options.one_by_one
    print(
        f"memory: the process grew by {after - before:.2f} MB over {options.tokens:,} tokens "
        f"({between - before:.2f} MB over {pieces:,} in pieces, then {options.one_by_one:,} one by one; "
        f"{layer.keys.shape[2]} slots per head, {before:.0f} MB resident, {seconds:.0f} s)"
    )


if __name__ == "__main__":
    main()
