"""The fingerprint of a prepared folder. A checkpoint keeps it to identify the text that it was trained on."""

from __future__ import annotations

import hashlib
from typing import Any

SPLITS = ("train", "validation", "test")


def fingerprint_of(tokenizer_sha256: str, splits: dict[str, Any]) -> str:
    """SHA-256 over the tokenizer's hash and the shards of each split. The same bytes give the same fingerprint."""
    digest = hashlib.sha256(tokenizer_sha256.encode())
    for name in SPLITS:
        entry = splits.get(name, {"shards": []})
        for shard in entry["shards"]:
            digest.update(
                f"\n{name} {entry['dtype']} {entry['row_tokens']} {shard['tokens']} {shard['sha256']}".encode()
            )
    return digest.hexdigest()
