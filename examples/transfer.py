"""What the two examples of a NAMM on other models share: their options, their training, and what a memory has kept."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from sinkmodel.memories import Memory
from sinkmodel.memories.selection import EMPTY
from sinkmodel.parser import OneLineParser, name_of, positive, whole
from sinkmodel.progress import CountedProgress

RATE = 3e-3  # of learning


def parser_of(script: str, description: str, updates: int, batch: int) -> OneLineParser:
    """The options of both examples; `updates` and `batch` are defaults."""
    example = f"Example:\n  python examples/{script}"
    parser = OneLineParser(script, description, example)
    parser.add_argument(
        "--artefact",
        type=name_of,
        default="namm-recall",
        metavar="NAME",
        help="a folder that sink-evolve wrote, or a Hub name (default: namm-recall, which comes with the package)",
    )
    parser.add_argument(
        "--updates", type=positive, default=updates, metavar="N", help=f"of the training (default: {updates})"
    )
    parser.add_argument(
        "--batch", type=positive, default=batch, metavar="N", help=f"samples of an update (default: {batch})"
    )
    parser.add_argument("--width", type=positive, default=64, metavar="N", help="of the model (default: 64)")
    parser.add_argument("--seed", type=whole, default=0, metavar="N")
    return parser


def train(
    model: torch.nn.Module, options: argparse.Namespace, lengths: tuple[int, int], loss_of: Callable[[int], Tensor]
) -> None:
    """Train with AdamW on `loss_of(length)`.

    Args:
        options: its `updates` are used.
        lengths: the shortest and the longest. A length is drawn for each update, up to a bound that reaches the longest
            after half of the updates, so that short samples are learned first.
    """
    shortest, longest = lengths
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    with CountedProgress("training", "updates", options.updates) as progress:
        for update in range(options.updates):
            bound = int(shortest + (longest - shortest) * min(1.0, 2 * update / options.updates))
            loss_of(int(torch.randint(shortest, bound + 1, ()))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (update + 1) / 20) * (1 - update / options.updates)
            optimizer.step()
            optimizer.zero_grad()
            progress.add(1)


def kept_of(memory: Memory) -> Tensor:
    """1 for each token that is held and 0 for the others, [layers, rows, KV heads, tokens]."""
    tokens = memory.columns
    found = []
    for layer in memory.layers:
        positions = layer.held_positions().long()
        kept = torch.zeros(*positions.shape[:2], tokens + 1)
        found.append(kept.scatter_(2, positions.masked_fill(positions == EMPTY, tokens), 1.0)[..., :tokens])
    return torch.stack(found)
