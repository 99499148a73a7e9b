"""The order of the rows: row number as a pure function of seed and n, with no permutation held in memory.

A Feistel network is a permutation of [0, 4^b). Applying it until the result is below `rows` (cycle walking) gives a
permutation of [0, rows). Every epoch has its own keys. The functions take no ranks, workers or micro-batches, so the
order cannot depend on them.
"""

from __future__ import annotations

import functools
import hashlib

ROUNDS = 6
_MASK64 = (1 << 64) - 1


def row_at(sample: int, rows: int, seed: int, shuffle: bool = True) -> int:
    """The row, in [0, rows), of the `sample`-th sample trained on, counted from 0 over all epochs."""
    epoch, place = divmod(sample, rows)
    return permuted(place, rows, seed, epoch) if shuffle else place


def permuted(place: int, rows: int, seed: int, epoch: int) -> int:
    """Image of `place` under the permutation of [0, rows) that belongs to (seed, epoch)."""
    half = max(1, ((rows - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    while True:
        place = _feistel(place, half, keys)
        if place < rows:
            return place


def _feistel(value: int, half: int, keys: tuple[int, ...]) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(x: int) -> int:
    """The finaliser of splitmix64: every input bit affects every output bit."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


@functools.lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))
