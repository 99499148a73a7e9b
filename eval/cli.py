"""`sink-eval MEASURE …`: one command with a subcommand for each question."""

from __future__ import annotations

import importlib

from eval.measures.command import command_line
from sinkmodel.console import command
from sinkmodel.parser import OneLineParser

# Each module has DESCRIPTION, EXAMPLE, add_arguments(parser) and run(options), and does its slow imports inside `run`.
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
        description=f"Answers questions about a model:\n\n{_questions()}\n\nsink-eval MEASURE --help explains each.",
        epilog="example: sink-eval ppl --model runs/sink --text book.txt --budget 256 --sinks 0 1 2 4",
    )
    top.add_argument("measure", choices=MEASURES, help="the question to answer")
    module = importlib.import_module(MEASURES[top.parse_args(argv[:1]).measure])
    parser = OneLineParser(
        prog=f"sink-eval {argv[0]}", description=module.DESCRIPTION, epilog=f"example: {module.EXAMPLE}"
    )
    module.add_arguments(parser)
    options = parser.parse_args(argv[1:])
    options.command_line = command_line(argv)
    return module.run(options)


def _questions() -> str:
    """One line per measure, from the modules' own descriptions."""
    questions = {name: importlib.import_module(path).DESCRIPTION.splitlines()[0] for name, path in MEASURES.items()}
    return "\n".join(f"  {name:11}  {description}" for name, description in questions.items())


if __name__ == "__main__":
    raise SystemExit(main())
