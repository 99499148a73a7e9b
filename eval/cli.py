"""`sink-eval MEASURE …`: one command, a subcommand a question."""

from __future__ import annotations

import importlib

from eval.measures.command import command_line
from sinkmodel.console import command
from sinkmodel.parser import OneLineParser

# Each module has DESCRIPTION, EXAMPLE, add_arguments(parser) and run(options), and imports what is heavy in `run` only.
MEASURES = {
    "ppl": "eval.measures.perplexity",
    "latency": "eval.measures.latency",
    "verify": "eval.measures.verdict.verify",
    "grid": "eval.measures.verdict.grid",
    "sinks": "eval.measures.attention.sinks",
    "streameval": "eval.measures.streams.streameval",
    "memories": "eval.measures.memories.memories",
    "longcontext": "eval.measures.longcontext.longcontext",
    "zeroshot": "eval.measures.harness.zeroshot",
    "report": "eval.report.report",
}


@command("sink-eval")
def main(argv: list[str]) -> int | None:
    top = OneLineParser(
        prog="sink-eval",
        description=f"Answers questions about a model:\n\n{_questions()}\n\nsink-eval MEASURE --help tells more.",
        epilog="example: sink-eval ppl --model runs/sink --text book.txt --budget 256 --sinks 0 1 2 4",
    )
    top.add_argument("measure", choices=MEASURES, help="which question")
    module = importlib.import_module(MEASURES[top.parse_args(argv[:1]).measure])
    parser = OneLineParser(
        prog=f"sink-eval {argv[0]}", description=module.DESCRIPTION, epilog=f"example: {module.EXAMPLE}"
    )
    module.add_arguments(parser)
    options = parser.parse_args(argv[1:])
    options.command_line = command_line(argv)
    return module.run(options)


def _questions() -> str:
    """A line each, from the modules' own descriptions."""
    told = {name: importlib.import_module(module).DESCRIPTION.splitlines()[0] for name, module in MEASURES.items()}
    return "\n".join(f"  {name:11}  {description}" for name, description in told.items())


if __name__ == "__main__":
    raise SystemExit(main())
