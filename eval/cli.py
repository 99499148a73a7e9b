"""`sink-eval MEASURE …`: one command with a subcommand for each question."""

from __future__ import annotations

import importlib
from types import ModuleType

from eval.commands.output import command_line
from sinkmodel.console import command
from sinkmodel.parser import OneLineParser

# NAME is `eval.commands.NAME`, which has DESCRIPTION, EXAMPLE, add_arguments(parser) and run(options).
COMMANDS = (
    "ppl",
    "latency",
    "verify",
    "grid",
    "sinks",
    "streameval",
    "memories",
    "longcontext",
    "zeroshot",
    "report",
)


@command("sink-eval")
def main(argv: list[str]) -> int | None:
    name = argv[0] if argv and argv[0] in COMMANDS else _top_parser().parse_args(argv[:1]).measure
    module = module_of(name)
    parser = OneLineParser(
        prog=f"sink-eval {name}", description=module.DESCRIPTION, epilog=f"example: {module.EXAMPLE}"
    )
    module.add_arguments(parser)
    options = parser.parse_args(argv[1:])
    options.command_line = command_line(argv)
    return module.run(options)


def module_of(name: str) -> ModuleType:
    """The module of a subcommand. Those of the other subcommands are not imported."""
    return importlib.import_module(f"eval.commands.{name}")


def _top_parser() -> OneLineParser:
    """The parser of `sink-eval --help`, and of a command line that does not begin with a subcommand."""
    questions = "\n".join(f"  {name:11}  {module_of(name).DESCRIPTION.splitlines()[0]}" for name in COMMANDS)
    parser = OneLineParser(
        prog="sink-eval",
        description=f"Answers questions about a model:\n\n{questions}\n\nsink-eval MEASURE --help explains each.",
        epilog="example: sink-eval ppl --model runs/sink --text book.txt --budget 256 --sinks 0 1 2 4",
    )
    parser.add_argument("measure", choices=COMMANDS, help="the question to answer")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
